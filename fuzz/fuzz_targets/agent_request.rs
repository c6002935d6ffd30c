#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_agent::fuzzing::agent_request(data));
