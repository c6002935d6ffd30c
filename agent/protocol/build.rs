//! Generates the ttrpc code of `proto/agent.proto`. Pure Rust: no protoc is needed.
use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            gen_mod: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    // The generated files start with inner attributes and inner doc comments, which `include!`
    // does not accept; the lints they switch off are switched off around the include instead.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let kept: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(path, kept)?;
    }
    Ok(())
}
