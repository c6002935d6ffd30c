#![no_main]
brig_fuzz::target!(brig_agent::fuzzing::agent_request);
