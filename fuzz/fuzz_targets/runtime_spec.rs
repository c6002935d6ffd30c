#![no_main]
brig_fuzz::target!(brig_agent::fuzzing::runtime_spec);
