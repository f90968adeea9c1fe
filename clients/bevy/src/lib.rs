//! Bevy plugin for [Safelight](https://github.com/safelight/safelight): an [`Image`] on the screen shows the previews of a
//! picture while it is computed.
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
//! Spawn a [`Generate`] on the entity that shows its image: a sprite, a UI node, a material. In each frame the newest preview
//! that has come is written into the image, and at the end the picture. [`Development`] tells how far it is.
//! [`GenerationAccepted`], [`PreviewShown`], [`PictureShown`] and [`GenerationFailed`] are triggered on the entity.
//! Despawning the entity, or removing [`Generate`], cancels the generation at the server.

#![warn(missing_docs)]

mod generation;
mod image;

use bevy::prelude::*;
use safelight::v1;
pub use safelight::{self, Client};
use tokio::runtime::{Builder, Runtime};

/// Compiles the program of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The plugin: it fills the images of [`Generate`] components.
pub struct SafelightPlugin {
    client: Client,
}

impl SafelightPlugin {
    /// Makes the plugin use this client.
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

/// The client of the plugin, and the thread on which it runs.
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
    /// Does not wait for the network. The server cancels generations that nobody watches after their grace period.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Requests a picture and fills an image with its previews. Changing the component starts a new generation.
#[derive(Component, Clone, Debug)]
#[require(Development)]
pub struct Generate {
    /// The request. Its first output is shown. The plugin chooses the encoding: RGBA8, sRGB.
    pub request: v1::GenerateRequest,
    /// The image that shows it, such as `images.reserve_handle()`. Its content is overwritten and takes the size of each
    /// preview.
    pub image: Handle<Image>,
}

impl Generate {
    /// Makes the component from a prompt, or from a whole `GenerateRequest`.
    pub fn new(request: impl Into<v1::GenerateRequest>, image: Handle<Image>) -> Self {
        Self {
            request: request.into(),
            image,
        }
    }
}

/// The progress of an entity's generation.
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
    /// The image shows the picture.
    Finished,
    /// The generation has ended without a picture. The image keeps the last preview.
    Failed(safelight::Error),
}

/// Event: the server has admitted the request of an entity.
#[derive(EntityEvent, Clone, Debug)]
pub struct GenerationAccepted {
    /// The entity.
    pub entity: Entity,
    /// The name, "generations/ID", for the client's `watch` and `get`.
    pub generation: String,
}

/// Event: the image of an entity shows a newer preview.
#[derive(EntityEvent, Clone, Debug)]
pub struct PreviewShown {
    /// The entity.
    pub entity: Entity,
    /// The step that it shows, from 1.
    pub step: i32,
}

/// Event: the image of an entity shows the finished picture.
#[derive(EntityEvent, Clone, Debug)]
pub struct PictureShown {
    /// The entity.
    pub entity: Entity,
    /// Seed of its noise.
    pub seed: u64,
}

/// Event: the generation of an entity has failed.
#[derive(EntityEvent, Clone, Debug)]
pub struct GenerationFailed {
    /// The entity.
    pub entity: Entity,
    /// Why it failed.
    pub error: safelight::Error,
}
