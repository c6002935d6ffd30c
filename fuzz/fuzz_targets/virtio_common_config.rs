#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_hypervisor::fuzzing::virtio_common_config(data));
