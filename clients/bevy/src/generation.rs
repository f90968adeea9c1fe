//! Passes events of generations from the client's thread to the app's schedule.

use bevy::prelude::*;
use safelight::{Client, Error, Event as Received, v1};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::image::{Pixels, in_raw_pixels};
use crate::{
    Development, Generate, GenerationAccepted, GenerationFailed, PictureShown, PreviewShown,
    Safelight,
};

/// A generation that is under way. Dropping it cancels the generation.
#[derive(Component)]
pub(crate) struct Follower {
    events: Receiver<Result<Received, Error>>,
    /// Step of the preview that is shown. A resumed stream may begin with a preview that was shown before.
    step: i32,
}

/// Starts the generations of spawned components, and starts those of changed ones again.
pub(crate) fn start(
    mut commands: Commands,
    safelight: Res<Safelight>,
    mut spawned: Query<(Entity, &Generate, &mut Development), Changed<Generate>>,
) {
    for (entity, generate, mut development) in &mut spawned {
        // Room for one event: if the app is slow or paused, the server skips previews.
        let (sender, events) = channel(1);
        let request = in_raw_pixels(generate.request.clone());
        let client = safelight.client().clone();
        safelight.runtime().spawn(follow(client, request, sender));
        *development = Development::Waiting;
        commands.entity(entity).insert(Follower { events, step: 0 });
    }
}

/// Gives the events of a generation to the app, until it ends or the app drops the receiver.
async fn follow(
    client: Client,
    request: v1::GenerateRequest,
    sender: Sender<Result<Received, Error>>,
) {
    let mut stream = client.generate(request);
    let mut name = None;
    loop {
        let event = tokio::select! {
            () = sender.closed() => break,
            event = stream.next() => event,
        };
        let Some(event) = event else { return };
        if let Ok(Received::Accepted { generation, .. }) = &event {
            name = Some(generation.clone());
        }
        if sender.send(event).await.is_err() {
            break;
        }
    }
    if let Some(name) = name {
        // If this fails, the server cancels the generation after its grace period, since nobody watches it.
        let _ = client.cancel(name).await;
    }
}

/// Shows what has come since the last frame; of several previews only the newest.
pub(crate) fn show(
    mut commands: Commands,
    mut images: ResMut<Assets<Image>>,
    mut running: Query<(Entity, &Generate, &mut Follower, &mut Development)>,
) {
    for (entity, generate, mut follower, mut development) in &mut running {
        let mut preview = None;
        while let Ok(event) = follower.events.try_recv() {
            match event {
                Ok(Received::Accepted { generation, .. }) => {
                    commands.trigger(GenerationAccepted { entity, generation });
                }
                Ok(Received::Progress(progress)) if progress.output_index == 0 => {
                    let (step, num_steps) = (progress.step, progress.num_steps);
                    *development = Development::Running { step, num_steps };
                }
                Ok(Received::Preview(newer)) if newer.output_index == 0 => preview = Some(newer),
                Ok(Received::Picture(picture)) if picture.output_index == 0 => {
                    preview = None;
                    let (width, height) = (picture.width_px, picture.height_px);
                    let data = picture.data.into();
                    if let Some(pixels) = Pixels::new(width, height, picture.stride_bytes, data) {
                        pixels.show(&mut images, &generate.image);
                    }
                    follower.step = i32::MAX;
                    *development = Development::Finished;
                    let seed = picture.seed;
                    commands.trigger(PictureShown { entity, seed });
                }
                Ok(Received::Finished { .. }) => {
                    commands.entity(entity).try_remove::<Follower>();
                }
                Err(error) => {
                    *development = Development::Failed(error.clone());
                    commands.entity(entity).try_remove::<Follower>();
                    commands.trigger(GenerationFailed { entity, error });
                }
                Ok(_) => {}
            }
        }
        if let Some(newer) = preview.filter(|newer| newer.step > follower.step) {
            follower.step = newer.step;
            let (width, height) = (
                newer.width_px.unsigned_abs(),
                newer.height_px.unsigned_abs(),
            );
            let stride_bytes = newer.stride_bytes.unsigned_abs() as usize;
            if let Some(pixels) = Pixels::new(width, height, stride_bytes, newer.data.into()) {
                pixels.show(&mut images, &generate.image);
                let step = newer.step;
                commands.trigger(PreviewShown { entity, step });
            }
        }
    }
}

/// Cancels the generation of an entity that stays but whose `Generate` was removed.
pub(crate) fn stop(removed: On<Remove, Generate>, mut commands: Commands) {
    if let Ok(mut entity) = commands.get_entity(removed.entity) {
        entity.try_remove::<Follower>();
    }
}
