//! Client of [Safelight](https://github.com/safelight/safelight): ask for a picture and watch it develop.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use safelight::{Client, Event};
//!
//! let client = Client::new("127.0.0.1:8421")?;
//! let mut generation = client.generate("a red potion");
//! while let Some(event) = generation.next().await {
//!     match event? {
//!         Event::Preview(preview) => println!("step {}", preview.step),
//!         Event::Picture(picture) => std::fs::write("potion.png", picture.data)?,
//!         _ => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A [`GenerationStream`] is a [`Stream`](futures_core::Stream) too. Dropping it lets the server know that nobody
//! watches; [`Client::cancel`] stops the work at once. A client is used within a Tokio runtime.
//!
//! A stream that is lost is resumed from its step, also at another replica. A refusal that says when to retry is sent
//! again then. Without a deadline a server that is frozen is noticed within 15 seconds.

#![warn(missing_docs)]

mod client;
mod connect;
mod develop;
mod error;
mod event;
mod received;
mod upload;

pub use client::{Authorization, Builder, Client, Server};
pub use develop::GenerationStream;
pub use error::Error;
pub use event::{Event, Picture};
pub use tonic::Code;
#[cfg(feature = "tls")]
pub use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// The messages and stubs of the contract.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!("stubs/safelight.v1.rs");

    impl From<&str> for GenerateRequest {
        /// One picture of a prompt, by the model's defaults.
        fn from(prompt: &str) -> Self {
            GenerationSpec {
                prompt: prompt.to_owned(),
                ..Default::default()
            }
            .into()
        }
    }

    impl From<GenerationSpec> for GenerateRequest {
        fn from(spec: GenerationSpec) -> Self {
            Self {
                spec: Some(spec),
                ..Default::default()
            }
        }
    }
}

/// The programs of the README are compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// What a call gives.
pub type Result<T> = std::result::Result<T, Error>;
