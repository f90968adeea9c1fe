//! Renders without a window: two sprites whose images develop side by side, and a third that is despawned at its first
//! preview.
//!
//!     cargo run --example headless -- 127.0.0.1:8421 FOLDER
//!
//! Writes into FOLDER, as raw RGBA8: `image-N.rgba`, the images of the sprites at the end, and `screen-STEP.rgba`, the
//! screen of 256 by 128 pixels as it was rendered at some steps of the first sprite and at the end (`screen-end.rgba`).
//! Prints `preview SPRITE STEP` for each preview that was shown, and `leaves GENERATION` for the third.

use std::time::Duration;
use std::{env, fs};

use bevy::app::ScheduleRunnerPlugin;
use bevy::camera::RenderTarget;
use bevy::core_pipeline::tonemapping::Tonemapping;
use bevy::prelude::*;
use bevy::render::gpu_readback::{Readback, ReadbackComplete};
use bevy::render::render_resource::{TextureFormat, TextureUsages};
use bevy::window::ExitCondition;
use bevy_safelight::{
    Client, Development, Generate, GenerationAccepted, GenerationFailed, PreviewShown,
    SafelightPlugin, safelight::v1,
};

/// Frames to render after the end, until the screen shows the final images.
const LAST_FRAMES: u32 = 20;

#[derive(Resource)]
struct Folder(String);

#[derive(Component)]
struct Shown(usize);

fn main() -> AppExit {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [address, folder] = arguments.as_slice() else {
        panic!("usage: headless HOST:PORT FOLDER");
    };
    let client = Client::new(address).expect("HOST:PORT");
    let no_window = WindowPlugin {
        primary_window: None,
        exit_condition: ExitCondition::DontExit,
        ..default()
    };
    App::new()
        .insert_resource(ClearColor(Color::BLACK))
        .insert_resource(Folder(folder.clone()))
        .add_plugins(
            DefaultPlugins
                .set(ImagePlugin::default_nearest())
                .set(no_window),
        )
        .add_plugins(ScheduleRunnerPlugin::run_loop(Duration::from_millis(16)))
        .add_plugins(SafelightPlugin::new(client))
        .add_systems(Startup, set_up)
        .add_systems(Update, leave)
        .add_observer(fail)
        .run()
}

fn set_up(mut commands: Commands, mut images: ResMut<Assets<Image>>) {
    let mut screen = Image::new_target_texture(256, 128, TextureFormat::Rgba8UnormSrgb, None);
    screen.texture_descriptor.usage |= TextureUsages::COPY_SRC;
    let screen = images.add(screen);
    let target = RenderTarget::Image(screen.clone().into());
    commands.spawn((Camera2d, target, Msaa::Off, Tonemapping::None));
    commands
        .spawn(Readback::texture(screen))
        .observe(write_screen);
    for (index, x) in [-64.0, 64.0].into_iter().enumerate() {
        let image = images.reserve_handle();
        let mut sprite = Sprite::from_image(image.clone());
        sprite.custom_size = Some(Vec2::splat(128.0)); // previews are smaller than the picture
        commands
            .spawn((
                Shown(index),
                sprite,
                Transform::from_xyz(x, 0.0, 0.0),
                Generate::new(request(index as u64 + 7, 40), image),
            ))
            .observe(move |shown: On<PreviewShown>| println!("preview {index} {}", shown.step));
    }
    let image = images.reserve_handle();
    commands
        .spawn(Generate::new(request(9, 50), image))
        .observe(|accepted: On<GenerationAccepted>| println!("leaves {}", accepted.generation))
        .observe(|shown: On<PreviewShown>, mut commands: Commands| {
            commands.entity(shown.entity).despawn();
        });
}

fn request(seed: u64, num_steps: i32) -> v1::GenerationSpec {
    v1::GenerationSpec {
        prompt: "a red potion".into(),
        num_inference_steps: Some(num_steps),
        outputs: vec![v1::OutputSpec { seed: Some(seed) }],
        ..default()
    }
}

fn write_screen(
    read: On<ReadbackComplete>,
    folder: Res<Folder>,
    shown: Query<(&Shown, &Development)>,
) {
    let mut name = "end".to_owned();
    for (shown, development) in &shown {
        if let (0, Development::Running { step, .. }) = (shown.0, development) {
            name = format!("{step:02}");
        }
    }
    fs::write(format!("{}/screen-{name}.rgba", folder.0), &read.data).expect("a folder");
}

/// Ends the app when all pictures have come and were rendered.
fn leave(
    mut frames: Local<u32>,
    mut exit: MessageWriter<AppExit>,
    folder: Res<Folder>,
    images: Res<Assets<Image>>,
    all: Query<&Development>,
    shown: Query<(&Shown, &Generate)>,
) {
    if !all.iter().all(|one| matches!(one, Development::Finished)) {
        return;
    }
    *frames += 1;
    if *frames < LAST_FRAMES {
        return;
    }
    for (Shown(index), generate) in &shown {
        let data = images
            .get(&generate.image)
            .and_then(|image| image.data.clone());
        let data = data.expect("the picture is shown");
        fs::write(format!("{}/image-{index}.rgba", folder.0), data).expect("a folder");
    }
    exit.write(AppExit::Success);
}

fn fail(failed: On<GenerationFailed>, mut exit: MessageWriter<AppExit>) {
    eprintln!("{}", failed.error);
    exit.write(AppExit::error());
}
