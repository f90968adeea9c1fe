//! The runner of the Rust client: reads cases, runs them, and prints the outcomes, a JSON object a line each.
//!
//! See clients/CONFORMANCE.md. Its argument is a descriptor set of the API, which it needs to read protobuf's JSON.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

use prost_reflect::{DescriptorPool, DynamicMessage};
use safelight::{Client, Event, Picture, v1};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::{JoinSet, spawn_blocking};
use v1::generation::State;

type Run<T> = Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Run<()> {
    let descriptors = env::args()
        .nth(1)
        .ok_or("usage: conformance DESCRIPTOR_SET")?;
    let pool = DescriptorPool::decode(fs::read(descriptors)?.as_slice())?;
    // Read in a thread, so that connections of the previous case can end meanwhile.
    while let Some(line) = spawn_blocking(|| io::stdin().lines().next()).await? {
        let case: Value = serde_json::from_str(&line?)?;
        println!("{}", run(&pool, &case).await?);
    }
    Ok(())
}

async fn run(pool: &DescriptorPool, case: &Value) -> Run<Value> {
    let client = client(case)?;
    let mut runs = JoinSet::new();
    for (index, request) in array(&case["requests"]).iter().enumerate() {
        let request = request_of(pool, request)?;
        let (client, case) = (client.clone(), case.clone());
        runs.spawn(async move { (index, generate(&client, &case, request).await) });
    }
    let mut generations = BTreeMap::new();
    while let Some(run) = runs.join_next().await {
        let (index, seen) = run?;
        generations.insert(index, seen?);
    }
    let generations: Vec<Value> = generations.into_values().collect();
    Ok(json!({"case": case["name"], "generations": generations}))
}

fn client(case: &Value) -> Run<Client> {
    let targets: Vec<&str> = array(&case["targets"]).iter().map(text).collect();
    let mut builder = Client::builder(targets.join(","))
        .api_key(text(&case["api_key"]))
        .patience(seconds(&case["patience_s"]))
        .retries(u32::try_from(case["retries"].as_u64().unwrap_or_default())?);
    if !text(&case["ca_file"]).is_empty() {
        let authority = safelight::Certificate::from_pem(fs::read(text(&case["ca_file"]))?);
        let mut tls = safelight::ClientTlsConfig::new()
            .ca_certificate(authority)
            .domain_name(text(&case["server_name"]));
        if !text(&case["cert_file"]).is_empty() {
            let (cert, key) = (text(&case["cert_file"]), text(&case["key_file"]));
            tls = tls.identity(safelight::Identity::from_pem(
                fs::read(cert)?,
                fs::read(key)?,
            ));
        }
        builder = builder.tls(tls);
    }
    match usize::try_from(case["max_message_bytes"].as_u64().unwrap_or_default())? {
        0 => {}
        bytes => builder = builder.max_message_bytes(bytes),
    }
    Ok(builder.build()?)
}

fn request_of(pool: &DescriptorPool, request: &Value) -> Run<v1::GenerateRequest> {
    let name = "safelight.v1.GenerateRequest";
    let descriptor = pool.get_message_by_name(name).ok_or("no such message")?;
    Ok(DynamicMessage::deserialize(descriptor, request)?.transcode_to()?)
}

/// Uploads the pictures of a case and puts their names into a request.
async fn start_from_pictures(
    client: &Client,
    case: &Value,
    request: &mut v1::GenerateRequest,
) -> Run<()> {
    if let Some(spec) = request
        .spec
        .as_mut()
        .filter(|_| !text(&case["init_image_file"]).is_empty())
    {
        let (init_image, mask) = (text(&case["init_image_file"]), text(&case["mask_file"]));
        spec.init_image = client.upload_image(fs::read(init_image)?).await?.name;
        spec.mask = client.upload_image(fs::read(mask)?).await?.name;
    }
    Ok(())
}

/// Adds to a request what a case has beside its message.
fn add_arguments(case: &Value, request: &mut v1::GenerateRequest) -> Run<()> {
    let interval = &case["guidance_interval"];
    if let Some(spec) = request.spec.as_mut().filter(|_| !interval[0].is_null()) {
        let share = |value: &Value| value.as_f64().map(|share| share as f32);
        spec.guidance_interval = Some(v1::GuidanceInterval {
            start: share(&interval[0]),
            end: share(&interval[1]),
        });
        spec.guidance_rescale = share(&case["guidance_rescale"]);
    }
    match i32::try_from(case["min_num_steps"].as_i64().unwrap_or_default())? {
        0 => {}
        steps => {
            request.quality_floor = Some(v1::QualityFloor {
                min_num_steps: Some(steps),
                ..Default::default()
            });
        }
    }
    Ok(())
}

async fn generate(client: &Client, case: &Value, mut request: v1::GenerateRequest) -> Run<Value> {
    start_from_pictures(client, case, &mut request).await?;
    add_arguments(case, &mut request)?;
    let mut seen = json!({
        "code": "OK", "reason": "", "violations": {}, "retry_after_s": null, "generation": "", "num_steps": 0,
        "cancelled": null, "watched": null,
    });
    let (mut reliable, mut steps) = (vec![], vec![]);
    let (mut previews, mut pictures) = (vec![], vec![]);
    let mut received_us = vec![];
    let cancel_at_step = case["cancel_at_step"].as_i64().unwrap_or_default();
    let mut stream = client.generate(request);
    if !seconds(&case["timeout_s"]).is_zero() {
        stream = stream.timeout(seconds(&case["timeout_s"]));
    }
    while let Some(event) = stream.next().await {
        match event {
            Err(error) => fail(&mut seen, &error),
            Ok(Event::Accepted { generation, .. }) => {
                seen["generation"] = generation.into();
                reliable.push("accepted");
            }
            Ok(Event::Progress(progress)) => {
                steps.push([progress.output_index, progress.step]);
                let due = cancel_at_step > 0 && i64::from(progress.step) >= cancel_at_step;
                if due && seen["cancelled"].is_null() {
                    let ended = client.cancel(text(&seen["generation"])).await?;
                    let steps: Vec<i32> = ended.outputs.iter().map(|output| output.step).collect();
                    seen["cancelled"] = json!({"state": state(&ended), "steps": steps});
                }
            }
            Ok(Event::Preview(_)) if case["measure"] == true => {
                received_us.push(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros());
            }
            Ok(Event::Preview(preview)) => {
                previews.push(json!({
                    "output_index": preview.output_index, "media_type": preview.media_type,
                    "width_px": preview.width_px, "height_px": preview.height_px,
                    "stride_bytes": preview.stride_bytes, "step": preview.step,
                    "num_bytes": preview.data.len(), "num_dropped": preview.num_dropped,
                }));
                tokio::time::sleep(seconds(&case["pause_s"])).await;
            }
            Ok(Event::Picture(picture)) => {
                reliable.push("picture");
                pictures.push(json!({
                    "output_index": picture.output_index, "media_type": picture.media_type,
                    "width_px": picture.width_px, "height_px": picture.height_px,
                    "stride_bytes": picture.stride_bytes, "seed": picture.seed.to_string(),
                    "sha256": sha256(&picture),
                }));
            }
            Ok(Event::Finished { finished, .. }) => {
                reliable.push("finished");
                seen["num_steps"] = finished.usage.unwrap_or_default().num_steps.into();
            }
            Ok(_) => {}
        }
    }
    if case["watch_again"] == true && seen["code"] == "OK" {
        seen["watched"] = watch_again(client, text(&seen["generation"])).await?;
    }
    seen["reliable"] = reliable.into();
    seen["steps"] = json!(steps);
    seen["previews"] = previews.into();
    seen["pictures"] = pictures.into();
    seen["received_us"] = json!(received_us);
    Ok(seen)
}

/// Watches a generation again: the events, and what the server reports about the generation and its models.
async fn watch_again(client: &Client, name: &str) -> Run<Value> {
    let mut none = v1::PreviewPolicy::default();
    none.set_method(v1::PreviewMethod::None);
    let mut reliable = vec![];
    let mut digests = BTreeMap::new();
    let mut stream = client.watch(name, Some(none));
    while let Some(event) = stream.next().await {
        match event? {
            Event::Accepted { .. } => reliable.push("accepted"),
            Event::Picture(picture) => {
                reliable.push("picture");
                digests.insert(picture.output_index, sha256(&picture));
            }
            Event::Finished { .. } => reliable.push("finished"),
            _ => {}
        }
    }
    let generation = client.get(name).await?;
    let models = client.models().await?;
    Ok(json!({
        "reliable": reliable,
        "sha256": digests.into_values().collect::<Vec<_>>(),
        "state": state(&generation),
        "models": models.iter().map(|model| &model.name).collect::<Vec<_>>(),
    }))
}

fn fail(seen: &mut Value, error: &safelight::Error) {
    seen["code"] = code_name(error.code()).into();
    seen["reason"] = error.reason().unwrap_or_default().into();
    seen["message"] = error.message().into();
    seen["violations"] = json!(error.violations());
    seen["retry_after_s"] = json!(error.retry_after().map(|after| after.as_secs_f64()));
}

/// The name of a code in gRPC's specification, such as "RESOURCE_EXHAUSTED"; Rust says ResourceExhausted.
fn code_name(code: safelight::Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

fn state(generation: &v1::Generation) -> &'static str {
    State::try_from(generation.state).map_or("", |state| state.as_str_name())
}

fn sha256(picture: &Picture) -> String {
    let digest = Sha256::digest(&picture.data);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs_f64(value.as_f64().unwrap_or_default())
}
