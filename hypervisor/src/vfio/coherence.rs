//! What KVM is told of a VM's devices: where one of them may pass the processor's caches by (no-snoop accesses that the IOMMU
//! does not correct), the guest's own types of memory and its WBINVD count, which KVM else takes no notice of.
//!
//! Trusts the node's kernel.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// Who is told. Implemented over KVM, and by tests.
pub trait Coherence: Send + Sync {
    /// The VM has the device of this descriptor, which stays open until it is [`Self::remove`]d.
    ///
    /// # Errors
    /// What the kernel says: before Linux 6.6 it knows no descriptor of a device.
    fn add(&self, device: BorrowedFd<'_>) -> io::Result<()>;
    /// It has it no more.
    fn remove(&self, device: BorrowedFd<'_>);
}

/// KVM's part of VFIO, of which a VM has one.
pub struct KvmVfio(DeviceFd);

impl KvmVfio {
    /// That of a VM that has none yet.
    ///
    /// # Errors
    /// What KVM says: `ENODEV` if it was built without.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..kvm_create_device::default()
        };
        Ok(Self(vm.create_device(&mut device)?))
    }

    fn set(&self, what: u32, device: BorrowedFd<'_>) -> io::Result<()> {
        let number = device.as_raw_fd();
        self.0
            .set_device_attr(&kvm_device_attr {
                group: KVM_DEV_VFIO_FILE,
                attr: what.into(),
                addr: (&raw const number).addr() as u64,
                ..kvm_device_attr::default()
            })
            .map_err(io::Error::from)
    }
}

impl Coherence for KvmVfio {
    fn add(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, device)
    }

    fn remove(&self, device: BorrowedFd<'_>) {
        // It refuses only what was not added.
        let _ = self.set(KVM_DEV_VFIO_FILE_DEL, device);
    }
}

/// A device's descriptor. What was told of it is taken back before it is closed: KVM holds the device open until then.
pub struct Told {
    fd: OwnedFd,
    to: Option<Arc<dyn Coherence>>,
}

impl Told {
    /// One that nobody is told of.
    #[must_use]
    pub fn nobody(fd: OwnedFd) -> Self {
        Self { fd, to: None }
    }

    /// Tells of it.
    ///
    /// # Errors
    /// What the kernel says; nobody knows of it then.
    pub fn tell(&mut self, coherence: Arc<dyn Coherence>) -> io::Result<()> {
        coherence.add(self.fd.as_fd())?;
        self.to = Some(coherence);
        Ok(())
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(coherence) = &self.to {
            coherence.remove(self.fd.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Mutex;

    use super::*;
    use crate::sync::lock;

    #[derive(Default)]
    struct Fake {
        refuses: bool,
        said: Mutex<Vec<(&'static str, i32, bool)>>,
    }

    impl Fake {
        fn say(&self, what: &'static str, device: BorrowedFd<'_>) {
            let open = nix::sys::stat::fstat(device).is_ok();
            lock(&self.said).push((what, device.as_raw_fd(), open));
        }
    }

    impl Coherence for Fake {
        fn add(&self, device: BorrowedFd<'_>) -> io::Result<()> {
            if self.refuses {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.say("added", device);
            Ok(())
        }
        fn remove(&self, device: BorrowedFd<'_>) {
            self.say("removed", device);
        }
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn what_was_told_of_a_device_is_taken_back_while_it_is_open() {
        let fake = Arc::new(Fake::default());
        let mut told = Told::nobody(null());
        let number = told.fd().as_raw_fd();
        told.tell(fake.clone()).unwrap();
        drop(told);
        assert_eq!(
            *lock(&fake.said),
            [("added", number, true), ("removed", number, true)]
        );
    }

    #[test]
    fn what_was_not_told_is_not_taken_back() {
        let fake = Arc::new(Fake {
            refuses: true,
            ..Fake::default()
        });
        drop(Told::nobody(null()));
        let mut told = Told::nobody(null());
        assert!(told.tell(fake.clone()).is_err());
        drop(told);
        assert!(lock(&fake.said).is_empty());
    }

    #[test]
    fn kvm_takes_no_file_that_is_no_device() {
        let Ok(kvm) = File::open("/dev/kvm") else {
            eprintln!("this host has no KVM");
            return;
        };
        let Ok(kvm) = crate::kvm::open(kvm.into(), true) else {
            eprintln!("this host's KVM is too old");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        match KvmVfio::new(&vm) {
            Ok(vfio) => {
                assert!(vfio.add(null().as_fd()).is_err());
                // A VM has one.
                assert!(KvmVfio::new(&vm).is_err());
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENODEV)),
        }
    }
}
