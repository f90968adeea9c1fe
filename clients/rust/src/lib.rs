//! Client of [Safelight](https://github.com/safelight/safelight), a text-to-image server that streams previews.
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
//! A [`GenerationStream`] is also a [`Stream`](futures_core::Stream). Dropping it tells the server that nobody watches;
//! [`Client::cancel`] stops the work at once. A client must be used within a Tokio runtime.
//!
//! A lost stream is resumed from its step, also at another replica. If a refusal says when to retry, the request is sent
//! again then. Without a deadline, a frozen server is noticed within 15 seconds.

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

/// The messages and stubs of the API.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!("stubs/safelight.v1.rs");

    impl From<&str> for GenerateRequest {
        /// A request for one picture of a prompt, with the model's defaults.
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

/// Compiles the programs of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;
