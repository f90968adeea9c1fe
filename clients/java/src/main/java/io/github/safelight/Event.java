package io.github.safelight;

import com.google.protobuf.ByteString;

/**
 * Something that happened to a generation. {@link Accepted} comes first, then {@link Progress}, {@link Preview} and
 * {@link Picture} as they come, {@link Finished} last.
 */
public sealed interface Event {
    /**
     * The request was admitted.
     *
     * @param generation its name, {@code "generations/ID"}, for {@link SafelightClient#watch} and
     *     {@link SafelightClient#cancel}
     * @param message the whole message: the spec with all defaults and seeds, warnings, the expected time
     */
    record Accepted(String generation, io.github.safelight.v1.Accepted message) implements Event {}

    /**
     * An output has made a denoising step.
     *
     * @param outputIndex index of the output in the spec, from 0
     * @param step steps made, from 1
     * @param numSteps steps in all
     * @param message the whole message: the batch's size, the expected time that is left
     */
    record Progress(int outputIndex, int step, int numSteps, io.github.safelight.v1.Progress message)
            implements Event {}

    /** Encoded pixels: a preview or a picture. {@link Images#decode} makes a {@code BufferedImage} of it. */
    sealed interface Image extends Event {
        /** {@return index of the output in the spec, from 0} */
        int outputIndex();

        /** {@return the encoding of the data, such as {@code "image/png"}} */
        String mediaType();

        /** {@return the width in pixels} */
        int widthPx();

        /** {@return the height in pixels} */
        int heightPx();

        /** {@return bytes from one row to the next for raw pixels, else 0} */
        int strideBytes();

        /** {@return whether the first row of raw pixels is the bottom one} */
        boolean bottomUp();

        /** {@return the encoded pixels} */
        ByteString data();
    }

    /**
     * How an output looks after a step.
     *
     * @param outputIndex index of the output in the spec, from 0
     * @param step the step it shows, from 1
     * @param mediaType the encoding of the data
     * @param widthPx the width in pixels
     * @param heightPx the height in pixels
     * @param strideBytes bytes from one row to the next for raw pixels, else 0
     * @param bottomUp whether the first row of raw pixels is the bottom one
     * @param numDropped previews that were skipped since the previous one, because the reader was slow
     * @param data the encoded pixels
     */
    record Preview(
            int outputIndex, int step, String mediaType, int widthPx, int heightPx, int strideBytes, boolean bottomUp,
            int numDropped, ByteString data)
            implements Image {}

    /**
     * A finished picture. Its SHA-256 has been checked.
     *
     * @param outputIndex index of the output in the spec, from 0
     * @param mediaType the encoding of the data
     * @param widthPx the width in pixels
     * @param heightPx the height in pixels
     * @param strideBytes bytes from one row to the next for raw pixels, else 0
     * @param bottomUp whether the first row of raw pixels is the bottom one
     * @param seed the seed of its noise, unsigned: see {@link Long#toUnsignedString(long)}
     * @param data the encoded pixels
     */
    record Picture(
            int outputIndex, String mediaType, int widthPx, int heightPx, int strideBytes, boolean bottomUp, long seed,
            ByteString data)
            implements Image {}

    /**
     * The generation has succeeded.
     *
     * @param generation its name
     * @param message the whole message: usage, timings, and where each picture came from
     */
    record Finished(String generation, io.github.safelight.v1.Finished message) implements Event {}
}
