#![no_main]
brig_fuzz::target!(brig_shim::fuzzing::agent_frames::agent_frames);
