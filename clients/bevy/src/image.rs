//! Copies raw pixels into images.

use bevy::prelude::*;
use safelight::v1;

const RAW: &str = "application/x-raw-rgba8";

/// Makes a request ask for raw pixels, which need no decoding.
pub(crate) fn in_raw_pixels(mut request: v1::GenerateRequest) -> v1::GenerateRequest {
    let raw = v1::PixelEncoding {
        media_type: RAW.to_owned(),
        ..Default::default()
    };
    request.preview.get_or_insert_default().accept = vec![raw.clone()];
    request.encoding = Some(raw);
    request
}

/// Pixels of a preview or a picture: rows from the top, 4 bytes a pixel.
pub(crate) struct Pixels {
    pub width_px: u32,
    pub height_px: u32,
    pub data: Vec<u8>,
}

impl Pixels {
    /// Removes the padding between rows. `None` if there are fewer bytes than the size needs.
    pub fn new(width_px: u32, height_px: u32, stride_bytes: usize, data: Vec<u8>) -> Option<Self> {
        let row_bytes = 4 * width_px as usize;
        let num_bytes = row_bytes * height_px as usize;
        let data = if stride_bytes == row_bytes {
            data
        } else {
            let rows = data.chunks(stride_bytes.max(1));
            rows.filter_map(|row| row.get(..row_bytes))
                .flatten()
                .copied()
                .collect()
        };
        (num_bytes > 0 && data.len() == num_bytes).then_some(Self {
            width_px,
            height_px,
            data,
        })
    }

    /// Overwrites an image, keeping its sampler. Bevy then uploads it once.
    pub fn show(self, images: &mut Assets<Image>, handle: &Handle<Image>) {
        let mut made = Image::transparent(); // RGBA8, sRGB
        let format = made.texture_descriptor.format;
        let there = images.get(handle).is_some_and(|image| {
            image.texture_descriptor.format == format
                && image.texture_descriptor.mip_level_count == 1
        });
        if there && let Some(mut image) = images.get_mut(handle) {
            self.fill(&mut image);
        } else {
            self.fill(&mut made);
            // This fails only if the handle belongs to another app, where nothing would show the image.
            let _ = images.insert(handle, made);
        }
    }

    fn fill(self, image: &mut Image) {
        image.texture_descriptor.size.width = self.width_px;
        image.texture_descriptor.size.height = self.height_px;
        image.data = Some(self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_laid_together() {
        let pixels = Pixels::new(1, 2, 8, vec![1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8]).unwrap();
        assert_eq!(pixels.data, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(Pixels::new(1, 2, 4, vec![0; 4]).is_none());
        assert!(Pixels::new(0, 0, 0, vec![]).is_none());
    }

    #[test]
    fn an_image_takes_the_size_of_what_is_shown() {
        let mut images = Assets::<Image>::default();
        let handle = images.reserve_handle();
        for size in [1, 2] {
            let data = vec![size as u8; 4 * (size * size) as usize];
            let pixels = Pixels::new(size, size, 4 * size as usize, data.clone()).unwrap();
            pixels.show(&mut images, &handle);
            let image = images.get(&handle).unwrap();
            assert_eq!((image.width(), image.height()), (size, size));
            assert_eq!(image.data.as_ref(), Some(&data));
        }
    }
}
