use tonic::codegen::Bytes;

use crate::v1;

/// Something that happened to a generation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The first event: the request was admitted.
    Accepted {
        /// The generation's name, "generations/ID", for [`Client::watch`](crate::Client::watch) and `cancel`.
        generation: String,
        /// What was accepted, with all defaults filled in.
        accepted: Box<v1::Accepted>,
    },
    /// An output has made a denoising step.
    Progress(v1::Progress),
    /// How an output looks after a step, encoded as its `media_type` says.
    Preview(v1::Preview),
    /// A finished picture.
    Picture(Picture),
    /// The last event: the generation has succeeded.
    Finished {
        /// The generation's name.
        generation: String,
        /// With its usage and timings.
        finished: Box<v1::Finished>,
    },
}

/// A finished picture. Its SHA-256 has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Picture {
    /// Index of the output in the spec, from 0.
    pub output_index: usize,
    /// Encoding of `data`.
    pub media_type: String,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Bytes from one row to the next for raw pixels, else 0.
    pub stride_bytes: usize,
    /// Seed of its noise.
    pub seed: u64,
    /// The encoded picture.
    pub data: Bytes,
}
