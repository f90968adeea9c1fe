package io.github.safelight;

import com.google.protobuf.ByteString;
import io.github.safelight.v1.ArtifactChunk;
import io.github.safelight.v1.ArtifactOffset;
import io.github.safelight.v1.GenerationEvent;
import io.github.safelight.v1.OutputSpec;
import io.github.safelight.v1.PixelEncoding;
import io.github.safelight.v1.PreviewPolicy;
import io.github.safelight.v1.WatchGenerationRequest;
import io.grpc.Status;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** What was received of a generation so far, over all connections. Used by one thread at a time. */
final class Received {
    static final String RAW = "application/x-raw-rgba8";

    private final @Nullable PreviewPolicy preview;
    private final boolean previewsBottomUp;
    private final Map<Integer, ByteString> parts = new HashMap<>();
    private String name;
    private long sequence;
    private List<OutputSpec> outputs = List.of();
    private boolean picturesBottomUp;
    private boolean durable;
    private boolean finished;
    private int numEvents;

    /** Nothing was received yet. {@code name} is empty if the generation has not been accepted. */
    Received(String name, @Nullable PreviewPolicy preview) {
        this.name = name;
        this.preview = preview;
        List<PixelEncoding> accepted = preview == null ? List.of() : preview.getAcceptList();
        previewsBottomUp = accepted.stream()
                .filter(encoding -> encoding.getMediaType().equals(RAW))
                .findFirst()
                .map(Received::isBottomUp)
                .orElse(false);
    }

    String name() {
        return name;
    }

    int numEvents() {
        return numEvents;
    }

    /** Whether the last event was received. */
    boolean isFinished() {
        return finished;
    }

    /** Whether another replica can continue it. */
    boolean isDurable() {
        return durable;
    }

    /** The request that continues where the last connection ended. */
    WatchGenerationRequest watch() {
        var request = WatchGenerationRequest.newBuilder().setName(name).setAfterSequence(sequence);
        if (preview != null) {
            request.setPreview(preview);
        }
        parts.forEach((index, part) -> request.addArtifactOffsets(
                ArtifactOffset.newBuilder().setOutputIndex(index).setOffset(part.size())));
        return request.build();
    }

    /**
     * The event that a message is for the caller; null for a piece of a picture and for details of the protocol.
     *
     * @throws SafelightException DATA_LOSS: a picture arrived damaged
     */
    @Nullable Event take(GenerationEvent message) {
        name = message.getGeneration();
        numEvents++;
        if (Long.compareUnsigned(message.getSequence(), sequence) > 0) {
            sequence = message.getSequence();
        }
        return switch (message.getEventCase()) {
            case ACCEPTED -> accepted(message.getAccepted());
            case PROGRESS -> progress(message.getProgress());
            case PREVIEW -> preview(message.getPreview());
            case ARTIFACT_CHUNK -> artifact(message.getArtifactChunk());
            case FINISHED -> finished(message.getFinished());
            default -> null;
        };
    }

    private Event accepted(io.github.safelight.v1.Accepted accepted) {
        outputs = accepted.getSpec().getOutputsList();
        picturesBottomUp = isBottomUp(accepted.getEncoding());
        durable = accepted.getDurability() == io.github.safelight.v1.Accepted.Durability.DURABILITY_REPLICATED;
        return new Event.Accepted(name, accepted);
    }

    private static Event progress(io.github.safelight.v1.Progress at) {
        return new Event.Progress(at.getOutputIndex(), at.getStep(), at.getNumSteps(), at);
    }

    private Event preview(io.github.safelight.v1.Preview seen) {
        boolean bottomUp = previewsBottomUp && seen.getMediaType().equals(RAW);
        return new Event.Preview(
                seen.getOutputIndex(), seen.getStep(), seen.getMediaType(), seen.getWidthPx(), seen.getHeightPx(),
                seen.getStrideBytes(), bottomUp, seen.getNumDropped(), seen.getData());
    }

    private @Nullable Event artifact(ArtifactChunk chunk) {
        int index = chunk.getOutputIndex();
        ByteString part = parts.getOrDefault(index, ByteString.EMPTY);
        if (chunk.getOffset() != part.size()) {
            return null;
        }
        part = part.concat(chunk.getData());
        parts.put(index, part);
        if (part.size() < chunk.getTotalBytes() || chunk.getSha256().isEmpty()) {
            return null;
        }
        if (!sha256(part).equals(chunk.getSha256())) {
            throw SafelightException.of(
                    Status.DATA_LOSS.withDescription("output " + index + " arrived damaged"), null);
        }
        long seed = index < outputs.size() ? outputs.get(index).getSeed() : 0;
        return new Event.Picture(
                index, chunk.getMediaType(), chunk.getWidthPx(), chunk.getHeightPx(), chunk.getStrideBytes(),
                picturesBottomUp && chunk.getMediaType().equals(RAW), seed, part);
    }

    private @Nullable Event finished(io.github.safelight.v1.Finished finish) {
        finished = true;
        return finish.getStatus().getCode() == 0 ? new Event.Finished(name, finish) : null;
    }

    private static boolean isBottomUp(PixelEncoding encoding) {
        return encoding.getRowOrder() == PixelEncoding.RowOrder.ROW_ORDER_BOTTOM_UP;
    }

    private static ByteString sha256(ByteString data) {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            for (ByteBuffer piece : data.asReadOnlyByteBufferList()) {
                digest.update(piece);
            }
            return ByteString.copyFrom(digest.digest());
        } catch (NoSuchAlgorithmException absent) {
            throw new AssertionError("every Java has SHA-256", absent);
        }
    }
}
