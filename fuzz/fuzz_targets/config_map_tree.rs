#![no_main]
brig_fuzz::target!(brig_agent::fuzzing::config_map_tree);
