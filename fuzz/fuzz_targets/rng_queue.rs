#![no_main]
brig_fuzz::target!(brig_hypervisor::fuzzing::rng_queue);
