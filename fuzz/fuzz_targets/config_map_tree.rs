#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| brig_agent::fuzzing::config_map_tree(data));
