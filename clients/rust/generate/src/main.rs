//! `safelight-generate DESCRIPTOR_SET DIRECTORY`: writes the stubs of `safelight.v1` into DIRECTORY.

use std::{env, error::Error, fs};

use prost::Message;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [descriptors, directory] = arguments.as_slice() else {
        return Err("usage: safelight-generate DESCRIPTOR_SET DIRECTORY".into());
    };
    fs::create_dir_all(directory)?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .bytes(".") // as `Bytes`, so that previews are not copied out of the receive buffer
        .extern_path(".google.rpc", "::tonic_types")
        .out_dir(directory)
        .compile_fds(FileDescriptorSet::decode(
            fs::read(descriptors)?.as_slice(),
        )?)?;
    Ok(())
}
