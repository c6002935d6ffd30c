#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_shim::fuzzing::assignment::cdi_file(data));
