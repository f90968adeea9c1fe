//! Bevy plugin for [Safelight](https://github.com/safelight/safelight): an [`Image`] develops while it is on the screen.
//!
//! ```no_run
//! use bevy::prelude::*;
//! use bevy_safelight::{Client, Generate, SafelightPlugin};
//!
//! fn setup(mut commands: Commands, images: Res<Assets<Image>>) {
//!     let image = images.reserve_handle();
//!     // With rendering: commands.spawn((Sprite::from_image(image.clone()), Generate::new(…)));
//!     commands.spawn(Generate::new("a red potion", image));
//! }
//!
//! let client = Client::new("127.0.0.1:8421").expect("HOST:PORT");
//! App::new()
//!     .add_plugins((MinimalPlugins, AssetPlugin::default(), ImagePlugin::default()))
//!     .add_plugins(SafelightPlugin::new(client))
//!     .add_systems(Startup, setup)
//!     .run();
//! ```
//!
//! Spawn a [`Generate`] beside whatever shows its image: a sprite, a UI node, a material. Each frame the newest preview
//! that has come is written into the image, at last the picture. [`Development`] says how far it is.
//! [`GenerationAccepted`], [`PreviewShown`], [`PictureShown`] and [`GenerationFailed`] are triggered on the entity.
//! Despawning the entity, or removing [`Generate`], cancels the generation at the server.

#![warn(missing_docs)]

mod generation;
mod image;

use bevy::prelude::*;
use safelight::v1;
pub use safelight::{self, Client};
use tokio::runtime::{Builder, Runtime};

/// The program of the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Adds what fills the images of [`Generate`].
pub struct SafelightPlugin {
    client: Client,
}

impl SafelightPlugin {
    /// Asks with this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }
}

impl Plugin for SafelightPlugin {
    fn build(&self, app: &mut App) {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("safelight")
            .enable_all()
            .build()
            .expect("a thread can be started");
        app.insert_resource(Safelight {
            client: self.client.clone(),
            runtime: Some(runtime),
        })
        .add_systems(PreUpdate, (generation::start, generation::show).chain())
        .add_observer(generation::stop);
    }
}

/// The client of the plugin and the thread that it works on.
#[derive(Resource)]
pub struct Safelight {
    client: Client,
    runtime: Option<Runtime>,
}

impl Safelight {
    /// The client, for other calls; its futures run in [`Safelight::runtime`].
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The runtime of the client's thread.
    pub fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is there until the drop")
    }
}

impl Drop for Safelight {
    /// Leaves without waiting for the network. The server cancels what nobody watches after its grace.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Asks for a picture and fills an image with its development. A changed one is asked anew.
#[derive(Component, Clone, Debug)]
#[require(Development)]
pub struct Generate {
    /// What is asked. Its first output is shown. The plugin chooses the encoding: RGBA8, sRGB.
    pub request: v1::GenerateRequest,
    /// Where it is shown, such as `images.reserve_handle()`. What an image has there before is overwritten, in the size
    /// of each preview.
    pub image: Handle<Image>,
}

impl Generate {
    /// Of a prompt, or of a whole `GenerateRequest`.
    pub fn new(request: impl Into<v1::GenerateRequest>, image: Handle<Image>) -> Self {
        Self {
            request: request.into(),
            image,
        }
    }
}

/// How far the generation of an entity is.
#[derive(Component, Clone, Debug, Default)]
pub enum Development {
    /// No step was made yet.
    #[default]
    Waiting,
    /// Steps are being made.
    Running {
        /// Steps made, from 1.
        step: i32,
        /// Steps in all.
        num_steps: i32,
    },
    /// The image has the picture.
    Finished,
    /// It has ended without a picture. The image keeps the last preview.
    Failed(safelight::Error),
}

/// The server has admitted the request of an entity.
#[derive(EntityEvent, Clone, Debug)]
pub struct GenerationAccepted {
    /// Which.
    pub entity: Entity,
    /// The name, "generations/ID", for the client's `watch` and `get`.
    pub generation: String,
}

/// The image of an entity has a newer preview.
#[derive(EntityEvent, Clone, Debug)]
pub struct PreviewShown {
    /// Which.
    pub entity: Entity,
    /// The step that it shows, from 1.
    pub step: i32,
}

/// The image of an entity has the picture.
#[derive(EntityEvent, Clone, Debug)]
pub struct PictureShown {
    /// Which.
    pub entity: Entity,
    /// Seed of its noise.
    pub seed: u64,
}

/// The generation of an entity has failed.
#[derive(EntityEvent, Clone, Debug)]
pub struct GenerationFailed {
    /// Which.
    pub entity: Entity,
    /// Why.
    pub error: safelight::Error,
}
