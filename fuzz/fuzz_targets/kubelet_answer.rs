#![no_main]
brig_fuzz::target!(brig_shim::fuzzing::assignment::kubelet_answer);
