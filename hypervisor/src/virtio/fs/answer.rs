//! One request, from its chain to the bytes of its reply: by the library, or by [`requests`] and [`read`].
//!
//! The same request is answered at once on the device's thread, or, when that finds that it may take long, from its
//! beginning by a helper. Nothing that the first saw of it is believed then: the guest may have rewritten it.

use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::GuestMemoryMmap;

use super::read::{self, Read};
use super::requests::{self, Session};
use super::served::Served;
use super::slow;
use super::{DeviceError, NAME};
use crate::virtio::chain::Chain;
use crate::virtio::ring::Descriptors;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answered {
    /// The bytes of its reply, 0 for none. None for what is no request.
    Done(Option<u32>),
    /// It may take long, and is for a helper of this lane.
    Later(u32),
}

/// Asked of a request's header: the lane in which it is to be done, if not at once.
pub(super) type Lanes<'a> = &'a mut dyn FnMut(&InHeader) -> Option<u32>;

/// What a driver's requests are served by, from one INIT to the next.
pub(super) struct Serving {
    pub(super) served: Arc<Served>,
    session: Session,
    server: Server<Arc<Served>>,
}

impl Serving {
    pub(super) fn new(served: &Arc<Served>) -> Arc<Self> {
        Arc::new(Self {
            served: Arc::clone(served),
            session: Session::default(),
            server: Server::new(Arc::clone(served)),
        })
    }

    /// Serves one chain. Without `lanes` nothing is put off.
    ///
    /// # Errors
    /// For a chain that breaks the rules.
    pub(super) fn answer(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
        lanes: Option<Lanes<'_>>,
    ) -> Result<Answered, DeviceError> {
        // Checked once as a whole: the library stops at a broken link as if it were the end.
        Chain::parse(descriptors.clone(), memory).map_err(|error| DeviceError::Guest {
            device: NAME,
            reason: error.to_string(),
        })?;
        let answered = self.try_answer(memory, descriptors, lanes);
        let answered = answered.unwrap_or(Answered::Done(None));
        self.served
            .request_ended(matches!(answered, Answered::Done(Some(_))));
        Ok(answered)
    }

    fn try_answer(
        &self,
        memory: &GuestMemoryMmap,
        descriptors: Descriptors,
        lanes: Option<Lanes<'_>>,
    ) -> Option<Answered> {
        let read = |from| Reader::from_descriptor_chain::<Arc<GuestMemoryMmap>>(memory, from);
        let writer = VirtioFsWriter::new::<Arc<GuestMemoryMmap>>(memory, descriptors.clone());
        // A buffer over the end of a region of RAM: no driver does that.
        let (mut reader, writer) = (read(descriptors.clone()).ok()?, writer.ok()?);
        // Too short for a header: there is nobody to answer.
        let header = reader.read_obj::<InHeader>().ok()?;
        let at_once = lanes.is_some();
        if let Some(lane) = lanes.and_then(|lanes| lanes(&header)) {
            return Some(Answered::Later(lane));
        }
        // Never as somebody else than is meant.
        Served::request_begins(header.opcode).ok()?;
        if header.opcode == read::READ {
            return Some(
                match read::answer(&self.served, header, reader, writer, at_once) {
                    Read::Done(written) => Answered::Done(Some(written)),
                    Read::Waits => Answered::Later(slow::lane_of(&header)),
                },
            );
        }
        if requests::knows(header.opcode) {
            let written = requests::answer(&self.served, &self.session, header, reader, writer);
            return Some(Answered::Done(Some(written)));
        }
        // The library reads the header again, and believes only what it reads itself.
        let reader = read(descriptors).ok()?;
        let written = self
            .server
            .handle_message(reader, Writer::VirtioFs(writer), None, None)
            .ok()
            .and_then(|written| u32::try_from(written).ok())
            .unwrap_or(0);
        Some(Answered::Done(Some(written)))
    }
}
