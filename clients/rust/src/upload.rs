use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use prost::bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::v1::UploadImageRequest;

const PIECE_BYTES: usize = 32 << 10; // the most that a server accepts in one message

/// The messages that upload a picture: its digest and its size, then its bytes.
pub(crate) struct Pieces {
    first: Option<UploadImageRequest>,
    data: Bytes,
}

impl Pieces {
    pub(crate) fn new(data: Bytes) -> Self {
        let first = UploadImageRequest {
            sha256: Sha256::digest(&data).to_vec().into(),
            total_bytes: i64::try_from(data.len()).unwrap_or(i64::MAX),
            ..Default::default()
        };
        Self {
            first: Some(first),
            data,
        }
    }

    fn advance(&mut self) -> Option<UploadImageRequest> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        if self.data.is_empty() {
            return None;
        }
        let piece = self.data.split_to(PIECE_BYTES.min(self.data.len()));
        Some(UploadImageRequest {
            data: piece,
            ..Default::default()
        })
    }
}

impl Stream for Pieces {
    type Item = UploadImageRequest;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.get_mut().advance())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_sent_in_pieces() {
        let data = Bytes::from(vec![7; 2 * PIECE_BYTES + 1]);
        let mut pieces = Pieces::new(data.clone());
        let first = pieces.advance().expect("there is a first one");
        assert_eq!(first.sha256.as_ref(), Sha256::digest(&data).as_slice());
        assert_eq!(first.total_bytes, 2 * 32_768 + 1);
        assert!(first.data.is_empty());
        let sizes: Vec<usize> = std::iter::from_fn(|| pieces.advance())
            .map(|piece| piece.data.len())
            .collect();
        assert_eq!(sizes, [PIECE_BYTES, PIECE_BYTES, 1]);
    }
}
