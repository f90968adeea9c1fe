package io.github.safelight;

import java.awt.image.BufferedImage;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import javax.imageio.ImageIO;

/** Converts previews and pictures to AWT images. A separate class, since not every runtime has {@code java.desktop}. */
public final class Images {
    private Images() {}

    /**
     * Decodes a preview or a picture: JPEG, PNG, raw RGBA8, and whatever else ImageIO has a plugin for.
     *
     * @return the pixels, in sRGB with straight alpha where the encoding has alpha
     * @throws IOException if the data cannot be decoded, or ImageIO has no reader for them
     */
    public static BufferedImage decode(Event.Image image) throws IOException {
        if (image.mediaType().equals(Received.RAW)) {
            return raw(image);
        }
        BufferedImage decoded = ImageIO.read(image.data().newInput());
        if (decoded == null) {
            throw new IOException("ImageIO has no reader for " + image.mediaType() + ": ask for image/png or image/jpeg");
        }
        return decoded;
    }

    private static BufferedImage raw(Event.Image image) {
        int width = image.widthPx();
        int height = image.heightPx();
        var decoded = new BufferedImage(width, height, BufferedImage.TYPE_INT_ARGB);
        ByteBuffer bytes = image.data().asReadOnlyByteBuffer().order(ByteOrder.BIG_ENDIAN);
        int[] row = new int[width];
        for (int y = 0; y < height; y++) {
            int start = (image.bottomUp() ? height - 1 - y : y) * image.strideBytes();
            for (int x = 0; x < width; x++) {
                row[x] = Integer.rotateRight(bytes.getInt(start + 4 * x), 8); // RGBA to ARGB
            }
            decoded.setRGB(0, y, width, 1, row, 0, width);
        }
        return decoded;
    }
}
