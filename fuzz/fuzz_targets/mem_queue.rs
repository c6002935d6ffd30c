#![no_main]
brig_fuzz::target!(brig_hypervisor::fuzzing::mem_queue);
