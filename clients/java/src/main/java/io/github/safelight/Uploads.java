package io.github.safelight;

import com.google.protobuf.ByteString;
import io.github.safelight.v1.UploadImageRequest;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.List;

/** Makes the messages that upload a picture. */
final class Uploads {
    /** The most that a server accepts in one message. */
    private static final int PIECE_BYTES = 32 << 10;

    private Uploads() {}

    /** The messages: the digest and the size of a picture, then its bytes. */
    static List<UploadImageRequest> pieces(byte[] data) {
        List<UploadImageRequest> pieces = new ArrayList<>();
        pieces.add(UploadImageRequest.newBuilder()
                .setSha256(ByteString.copyFrom(sha256(data)))
                .setTotalBytes(data.length)
                .build());
        for (int start = 0; start < data.length; start += PIECE_BYTES) {
            var piece = ByteString.copyFrom(data, start, Math.min(PIECE_BYTES, data.length - start));
            pieces.add(UploadImageRequest.newBuilder().setData(piece).build());
        }
        return pieces;
    }

    private static byte[] sha256(byte[] data) {
        try {
            return MessageDigest.getInstance("SHA-256").digest(data);
        } catch (NoSuchAlgorithmException missing) {
            throw new IllegalStateException("every Java platform has SHA-256", missing);
        }
    }
}
