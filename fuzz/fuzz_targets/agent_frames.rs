#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_shim::fuzzing::agent_frames::agent_frames(data));
