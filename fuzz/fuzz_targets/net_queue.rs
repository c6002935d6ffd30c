#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_hypervisor::fuzzing::net_queue(data));
