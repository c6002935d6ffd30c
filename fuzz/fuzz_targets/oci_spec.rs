#![no_main]
brig_fuzz::target!(brig_shim::fuzzing::oci_spec);
