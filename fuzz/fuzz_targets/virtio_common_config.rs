#![no_main]
brig_fuzz::target!(brig_hypervisor::fuzzing::virtio_common_config);
