use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use tonic::Code;

use crate::v1::{self, generation_event};
use crate::{Error, Event, Picture};

/// What was received of a generation so far, over all connections.
#[derive(Default)]
pub(crate) struct Received {
    /// Index of the server that the generation uses.
    pub at: usize,
    pub preview: Option<v1::PreviewPolicy>,
    pub name: String,
    pub num_events: u64,
    pub finished: bool,
    pub durable: bool,
    sequence: u64,
    seeds: Vec<u64>,
    parts: BTreeMap<i32, Part>,
}

/// The received part of a picture. `data` is taken out when it is complete; `num_bytes` stays.
#[derive(Default)]
struct Part {
    data: Vec<u8>,
    num_bytes: i64,
}

impl Received {
    pub fn new(at: usize, name: String, preview: Option<v1::PreviewPolicy>) -> Self {
        Self {
            at,
            name,
            preview,
            ..Default::default()
        }
    }

    /// The request that continues where the last connection ended.
    pub fn watch(&self) -> v1::WatchGenerationRequest {
        v1::WatchGenerationRequest {
            name: self.name.clone(),
            after_sequence: self.sequence,
            preview: self.preview.clone(),
            artifact_offsets: self
                .parts
                .iter()
                .map(|(&output_index, part)| v1::ArtifactOffset {
                    output_index,
                    offset: part.num_bytes,
                })
                .collect(),
        }
    }

    /// The event that a message is for the caller; `None` for a piece of a picture and for details of the protocol.
    pub fn take(&mut self, message: v1::GenerationEvent) -> Result<Option<Event>, Error> {
        self.num_events += 1;
        self.sequence = self.sequence.max(message.sequence);
        self.name = message.generation;
        Ok(match message.event {
            Some(generation_event::Event::Accepted(accepted)) => Some(self.accepted(accepted)),
            Some(generation_event::Event::Progress(progress)) => Some(Event::Progress(progress)),
            Some(generation_event::Event::Preview(preview)) => Some(Event::Preview(preview)),
            Some(generation_event::Event::ArtifactChunk(chunk)) => {
                self.artifact(chunk)?.map(Event::Picture)
            }
            Some(generation_event::Event::Finished(finished)) => {
                self.finished = true;
                // If the generation failed, the call ends with the same status.
                let succeeded = finished
                    .status
                    .as_ref()
                    .is_none_or(|status| status.code == 0);
                succeeded.then(|| Event::Finished {
                    generation: self.name.clone(),
                    finished: Box::new(finished),
                })
            }
            _ => None,
        })
    }

    fn accepted(&mut self, accepted: v1::Accepted) -> Event {
        let outputs = accepted.spec.iter().flat_map(|spec| &spec.outputs);
        self.seeds = outputs.map(v1::OutputSpec::seed).collect();
        self.durable = accepted.durability() == v1::accepted::Durability::Replicated;
        Event::Accepted {
            generation: self.name.clone(),
            accepted: Box::new(accepted),
        }
    }

    fn artifact(&mut self, chunk: v1::ArtifactChunk) -> Result<Option<Picture>, Error> {
        let index = chunk.output_index;
        let part = self.parts.entry(index).or_default();
        if chunk.offset != part.num_bytes {
            return Ok(None);
        }
        part.data.extend_from_slice(&chunk.data);
        part.num_bytes += chunk.data.len() as i64;
        if part.num_bytes < chunk.total_bytes || chunk.sha256.is_empty() {
            return Ok(None);
        }
        if Sha256::digest(&part.data).as_slice() != &chunk.sha256[..] {
            return Err(Error::new(
                Code::DataLoss,
                format!("output {index} arrived damaged"),
            ));
        }
        let output_index = usize::try_from(index).unwrap_or_default();
        Ok(Some(Picture {
            output_index,
            media_type: chunk.media_type,
            width_px: chunk.width_px.unsigned_abs(),
            height_px: chunk.height_px.unsigned_abs(),
            stride_bytes: usize::try_from(chunk.stride_bytes).unwrap_or_default(),
            seed: self.seeds.get(output_index).copied().unwrap_or_default(),
            data: std::mem::take(&mut part.data).into(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: i64, data: &'static [u8], sha256: Vec<u8>) -> v1::GenerationEvent {
        v1::GenerationEvent {
            generation: "generations/g".into(),
            event: Some(generation_event::Event::ArtifactChunk(v1::ArtifactChunk {
                offset,
                total_bytes: 6,
                data: data.into(),
                sha256: sha256.into(),
                ..Default::default()
            })),
            ..Default::default()
        }
    }

    #[test]
    fn a_picture_is_put_together_once() {
        let digest = Sha256::digest(b"abcdef").to_vec();
        let mut received = Received::default();
        assert_eq!(received.take(piece(0, b"abc", vec![])).unwrap(), None);
        assert_eq!(received.watch().artifact_offsets[0].offset, 3);
        assert_eq!(received.take(piece(0, b"abc", vec![])).unwrap(), None);
        let last = received.take(piece(3, b"def", digest.clone())).unwrap();
        let Some(Event::Picture(picture)) = last else {
            panic!("{last:?}")
        };
        assert_eq!(&picture.data[..], b"abcdef");
        assert_eq!(received.take(piece(3, b"def", digest)).unwrap(), None);
        assert_eq!(received.watch().artifact_offsets[0].offset, 6);
    }

    #[test]
    fn a_damaged_picture_is_an_error() {
        let mut received = Received::default();
        let error = received.take(piece(0, b"abcdef", vec![0; 32])).unwrap_err();
        assert_eq!(error.code(), Code::DataLoss);
    }

    #[test]
    fn another_connection_goes_on_after_the_last_state_event() {
        let mut received = Received::default();
        for sequence in [1, 0, 2, 0] {
            let event = v1::GenerationEvent {
                sequence,
                generation: "generations/g".into(),
                ..Default::default()
            };
            received.take(event).unwrap();
        }
        let watch = received.watch();
        assert_eq!(
            (watch.name.as_str(), watch.after_sequence),
            ("generations/g", 2)
        );
    }
}
