#![no_main]
brig_fuzz::target!(brig_hypervisor::fuzzing::pmem_queue);
