//! `streams HOST:PORT`: what becomes of streams that are dropped, and of those that nobody reads. See test_rust.py.

use safelight::v1::{GenerateRequest, GenerationSpec, OutputSpec, PixelEncoding, PreviewPolicy};
use safelight::{Client, Event};

/// Together they have more than the 5 MiB that hyper lets a connection have unread, at 64 KiB each.
const NUM_UNREAD: usize = 100;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::new(std::env::args().nth(1).ok_or("HOST:PORT")?)?;
    let mut unread = Vec::new();
    for index in 0..NUM_UNREAD {
        let mut stream = client.generate(raw(index as u64 % 4, 30));
        stream.next().await.ok_or("it is accepted")??;
        unread.push(stream);
    }
    let picture = client.generate("a blue shield").picture().await?;
    println!("read {}", picture.media_type);
    drop(unread);

    let mut stream = client.generate(raw(7, 900));
    let mut name = String::new();
    while let Some(event) = stream.next().await {
        match event? {
            Event::Accepted { generation, .. } => name = generation,
            Event::Preview(_) => break,
            _ => {}
        }
    }
    drop(stream);
    println!("dropped {name}");
    std::io::stdin().read_line(&mut name)?; // the connection stays until the test has looked
    Ok(())
}

fn raw(seed: u64, num_steps: i32) -> GenerateRequest {
    let encoding = PixelEncoding {
        media_type: "application/x-raw-rgba8".into(),
        ..Default::default()
    };
    let spec = GenerationSpec {
        prompt: "a red potion".into(),
        num_inference_steps: Some(num_steps),
        outputs: vec![OutputSpec { seed: Some(seed) }],
        ..Default::default()
    };
    GenerateRequest {
        encoding: Some(encoding.clone()),
        preview: Some(PreviewPolicy {
            accept: vec![encoding],
            ..Default::default()
        }),
        ..spec.into()
    }
}
