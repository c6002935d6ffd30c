//! A machine that is built to be captured: its guest boots, stands still, loses its devices and is written to a file.

use std::fs::File;
use std::sync::mpsc::Sender;

use kvm_ioctls::Kvm;
use vm_memory::GuestAddressSpace as _;

use super::{Cpus, StartError, Vm};
use crate::arch::x86_64::cpuid;
use crate::kvm;
use crate::template::cpu::{self, CpuState};
use crate::template::pages;
use crate::template::point::CapturePoint;
use crate::template::registers::Write;
use crate::template::{Head, Shape, TemplateError};
use crate::vcpu::Machine;

/// What can be asked of the host before the filters are in force.
pub(super) struct Prepared {
    file: File,
    shape: Shape,
    msrs: Vec<u32>,
}

/// The capture of one VM.
pub(super) struct Capture {
    file: File,
    shape: Shape,
    /// To the CPU: it is alone.
    alone: Sender<()>,
    /// Once the devices have gone.
    devices: Option<(u8, Vec<Write>)>,
}

impl Capture {
    /// Into this file.
    pub(super) fn prepare(file: File, kvm: &Kvm, shape: &Shape) -> Result<Prepared, StartError> {
        Ok(Prepared {
            file,
            shape: shape.clone(),
            msrs: cpu::model_registers(kvm).map_err(kvm::failed("KVM_GET_MSR_INDEX_LIST"))?,
        })
    }
}

impl Prepared {
    /// Lets the machine know where its guest is to be captured.
    pub(super) fn arm(self, cpus: &Cpus, machine: &mut Machine) -> Result<Capture, StartError> {
        let entries =
            cpuid::for_vcpu(&cpus.supported, 0, cpus.most).map_err(kvm::failed("CPUID"))?;
        let (point, alone) = CapturePoint::new(cpus.kvm.clone(), entries, self.msrs);
        machine.capture = Some(point);
        Ok(Capture {
            file: self.file,
            shape: self.shape,
            alone,
            devices: None,
        })
    }
}

impl Vm {
    /// To be called at [`crate::notice::Notice::Still`]: takes the devices away.
    ///
    /// # Errors
    /// If one of them is in no state to be captured.
    pub fn still(&mut self) -> Result<(), StartError> {
        let devices = self.board.take_away()?;
        if let Some(capture) = &mut self.capture {
            capture.devices = Some(devices);
            // A CPU that is gone has said so.
            let _ = capture.alone.send(());
        }
        Ok(())
    }

    /// To be called at [`crate::notice::Notice::Captured`]: writes the file; its length, and runs of pages in it.
    ///
    /// # Errors
    /// What the host says of the file.
    pub fn captured(&mut self, cpu: CpuState) -> Result<(u64, usize), StartError> {
        let capture = self.capture.take();
        let Some(Capture {
            file,
            shape,
            devices: Some((functions, devices)),
            ..
        }) = capture
        else {
            return Err(StartError::State("nothing was to be captured".to_owned()));
        };
        let memory = self.board.memory().memory();
        let head = Head {
            shape,
            cpu,
            functions,
            devices,
            extents: pages::extents(&memory).map_err(TemplateError::Memory)?,
        };
        let length = head.write(&memory, &file)?;
        Ok((length, head.extents.len()))
    }
}
