//! Where interrupts of functions go: sources that somebody signals, routed to messages.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An MSI message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where the function writes.
    pub address: u64,
    /// What it writes.
    pub data: u32,
}

/// One interrupt source: signalling `trigger` delivers what is routed to `gsi`.
pub struct Route {
    /// Global system interrupt.
    pub gsi: u32,
    /// Bound to it.
    pub trigger: EventFd,
}

/// Gives out interrupt sources and routes them to messages. Implemented over KVM, and by tests.
pub trait Routes: Send + Sync {
    /// Allocates a source.
    ///
    /// # Errors
    /// If there are none left or the hypervisor refuses.
    fn allocate(&self) -> io::Result<Route>;
    /// Routes several sources at once.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn update(&self, routes: &[(u32, Message)]) -> io::Result<()>;
    /// Lets what signals a source interrupt nobody for now: it stays in the source's event.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn disconnect(&self, route: &Route) -> io::Result<()>;
    /// Ends that; what was signalled meanwhile is delivered.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn connect(&self, route: &Route) -> io::Result<()>;
    /// Takes a source back: nothing signals it any more.
    fn release(&self, route: Route);
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake {
    //! Routes that count.

    use std::sync::Mutex;

    use super::*;
    use crate::sync::lock;

    /// Records updates; triggers are plain eventfds.
    #[derive(Default)]
    pub(crate) struct FakeRoutes {
        pub(crate) updates: Mutex<Vec<Vec<(u32, Message)>>>,
        pub(crate) triggers: Mutex<Vec<EventFd>>,
        pub(crate) released: Mutex<Vec<u32>>,
        /// Sources that interrupt nobody.
        pub(crate) disconnected: Mutex<Vec<u32>>,
    }

    impl Routes for FakeRoutes {
        fn allocate(&self) -> io::Result<Route> {
            let trigger = EventFd::new(libc::EFD_NONBLOCK)?;
            let mut triggers = lock(&self.triggers);
            triggers.push(trigger.try_clone()?);
            let gsi = 23 + u32::try_from(triggers.len()).map_err(io::Error::other)?;
            Ok(Route { gsi, trigger })
        }
        fn update(&self, routes: &[(u32, Message)]) -> io::Result<()> {
            lock(&self.updates).push(routes.to_vec());
            Ok(())
        }
        fn disconnect(&self, route: &Route) -> io::Result<()> {
            let mut disconnected = lock(&self.disconnected);
            assert!(!disconnected.contains(&route.gsi), "twice");
            disconnected.push(route.gsi);
            Ok(())
        }
        fn connect(&self, route: &Route) -> io::Result<()> {
            let mut disconnected = lock(&self.disconnected);
            assert!(disconnected.contains(&route.gsi), "twice");
            disconnected.retain(|gsi| *gsi != route.gsi);
            Ok(())
        }
        fn release(&self, route: Route) {
            lock(&self.disconnected).retain(|gsi| *gsi != route.gsi);
            lock(&self.released).push(route.gsi);
        }
    }
}
