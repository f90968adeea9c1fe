package io.github.safelight;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.ByteString;
import io.github.safelight.v1.ArtifactChunk;
import io.github.safelight.v1.GenerateRequest;
import io.github.safelight.v1.GenerateResponse;
import io.github.safelight.v1.GenerationEvent;
import io.github.safelight.v1.GenerationServiceGrpc;
import io.grpc.Context;
import io.grpc.Server;
import io.grpc.Status;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import io.grpc.stub.StreamObserver;
import java.security.MessageDigest;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Consumer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/** Tests of the forms in which a generation can be read, against a server in this process. */
@Timeout(20)
final class DevelopmentTest {
    private static final ByteString PIXELS = ByteString.copyFromUtf8("pixels");

    private final AtomicReference<Consumer<StreamObserver<GenerateResponse>>> answer =
            new AtomicReference<>(DevelopmentTest::develop);
    private final CompletableFuture<GenerateRequest> asked = new CompletableFuture<>();
    private final CompletableFuture<Boolean> left = new CompletableFuture<>();
    private Server server;
    private SafelightClient client;

    @BeforeEach
    void start() throws Exception {
        String name = InProcessServerBuilder.generateName();
        server = InProcessServerBuilder.forName(name)
                .addService(new GenerationServiceGrpc.GenerationServiceImplBase() {
                    @Override
                    public void generate(GenerateRequest request, StreamObserver<GenerateResponse> events) {
                        asked.complete(request);
                        Context.current().addListener(context -> left.complete(true), Runnable::run);
                        answer.get().accept(events);
                    }
                })
                .build()
                .start();
        var channel = InProcessChannelBuilder.forName(name).build();
        client = new SafelightClient(
                new Servers(List.of(() -> channel)), new EventSubscription.Persistence(java.time.Duration.ZERO, 0));
    }

    @AfterEach
    void stop() {
        client.close();
        server.shutdownNow();
    }

    /** Two steps, a picture in two pieces, and the end. */
    private static void develop(StreamObserver<GenerateResponse> events) {
        send(events, event -> event.setSequence(1).getAcceptedBuilder());
        for (int step = 1; step <= 2; step++) {
            int made = step;
            send(events, event -> event.getProgressBuilder().setStep(made).setNumSteps(2));
        }
        send(events, event -> event.setArtifactChunk(chunk(0, PIXELS.substring(0, 2), ByteString.EMPTY)));
        send(events, event -> event.setArtifactChunk(chunk(2, PIXELS.substring(2), sha256(PIXELS))));
        send(events, event -> event.setSequence(2).getFinishedBuilder());
        events.onCompleted();
    }

    /** A generation that is admitted, and of which nothing more comes. */
    private static void stall(StreamObserver<GenerateResponse> events) {
        send(events, event -> event.setSequence(1).getAcceptedBuilder());
    }

    private static void send(StreamObserver<GenerateResponse> events, Consumer<GenerationEvent.Builder> fill) {
        var event = GenerationEvent.newBuilder().setGeneration("generations/a");
        fill.accept(event);
        events.onNext(GenerateResponse.newBuilder().setEvent(event).build());
    }

    private static ArtifactChunk chunk(long offset, ByteString data, ByteString sum) {
        return ArtifactChunk.newBuilder()
                .setMediaType("image/png").setOffset(offset).setTotalBytes(PIXELS.size()).setData(data).setSha256(sum)
                .build();
    }

    private static ByteString sha256(ByteString data) {
        try {
            return ByteString.copyFrom(MessageDigest.getInstance("SHA-256").digest(data.toByteArray()));
        } catch (java.security.NoSuchAlgorithmException absent) {
            throw new AssertionError(absent);
        }
    }

    private static List<String> kinds(List<Event> events) {
        return events.stream().map(event -> event.getClass().getSimpleName()).toList();
    }

    @Test
    void itIsALoopOrAStream() {
        try (var events = client.generate("a red potion").stream()) {
            var all = events.toList();
            assertEquals(List.of("Accepted", "Progress", "Progress", "Picture", "Finished"), kinds(all));
            assertEquals(PIXELS, ((Event.Picture) all.get(3)).data());
        }
        assertFalse(asked.join().getRequestId().isEmpty(), "it can be sent again");
        var iterator = client.generate("a red potion").iterator();
        iterator.forEachRemaining(event -> {});
        assertFalse(iterator.hasNext());
        assertThrows(NoSuchElementException.class, iterator::next);
    }

    @Test
    void itIsAFuture() {
        assertEquals(PIXELS, client.generate("a red potion").picture().join().data());
        assertEquals(1, client.generate("a red potion").pictures().join().size());
    }

    @Test
    void itIsAPublisherThatReadsNoFurtherThanItIsAsked() throws Exception {
        var reader = new Reader();
        client.generate("a red potion").subscribe(reader);
        reader.subscription.request(1);
        assertEquals("Accepted", reader.signals.take());
        assertNull(reader.signals.poll(20, TimeUnit.MILLISECONDS));
        reader.subscription.request(3);
        assertEquals("Progress", reader.signals.take());
        assertEquals("Progress", reader.signals.take());
        assertEquals("Picture", reader.signals.take());
        reader.subscription.request(Long.MAX_VALUE);
        assertEquals("Finished", reader.signals.take());
        assertEquals("complete", reader.signals.take());
    }

    @Test
    void whoAsksForNothingIsToldSo() throws Exception {
        answer.set(DevelopmentTest::stall);
        var reader = new Reader();
        client.generate("a red potion").subscribe(reader);
        reader.subscription.request(2);
        assertEquals("Accepted", reader.signals.take());
        reader.subscription.request(0);
        assertEquals("IllegalArgumentException", reader.signals.take());
        assertTrue(left.join());
    }

    @Test
    void itIsReadOnce() throws Exception {
        var development = client.generate("a red potion");
        development.pictures().join();
        assertThrows(IllegalStateException.class, development::iterator);
        assertThrows(IllegalStateException.class, development::picture);
        var reader = new Reader();
        development.subscribe(reader);
        assertEquals("IllegalStateException", reader.signals.take());
    }

    @Test
    void closingItLetsTheServerKnowAndEndsTheLoop() {
        answer.set(DevelopmentTest::stall);
        var development = client.generate("a red potion");
        var events = development.iterator();
        assertInstanceOf(Event.Accepted.class, events.next());
        CompletableFuture.runAsync(development::close);
        assertFalse(events.hasNext());
        assertTrue(left.join());
    }

    @Test
    void cancellingTheFutureLetsTheServerKnow() {
        answer.set(DevelopmentTest::stall);
        var picture = client.generate("a red potion").picture();
        asked.join();
        picture.cancel(true);
        assertTrue(left.join());
        var development = client.generate("a red potion");
        var pictures = development.pictures();
        development.close();
        assertThrows(CancellationException.class, pictures::join);
    }

    @Test
    void aReaderThatIsInterruptedLeaves() {
        answer.set(DevelopmentTest::stall);
        var events = client.generate("a red potion").iterator();
        events.next();
        Thread.currentThread().interrupt();
        var failure = assertThrows(SafelightException.class, events::hasNext);
        assertEquals(Status.Code.CANCELLED, failure.getCode());
        assertTrue(Thread.interrupted(), "the caller can see that it was interrupted");
        assertTrue(left.join());
    }

    @Test
    void aDamagedPictureIsAnError() {
        answer.set(events -> {
            send(events, event -> event.setSequence(1).getAcceptedBuilder());
            send(events, event -> event.setArtifactChunk(chunk(0, PIXELS, sha256(ByteString.EMPTY))));
        });
        var failure = assertThrows(CompletionException.class, () -> client.generate("a red potion").picture().join());
        assertEquals(Status.Code.DATA_LOSS, ((SafelightException) failure.getCause()).getCode());
    }

    @Test
    void closingTheClientEndsWhatIsRead() {
        answer.set(DevelopmentTest::stall);
        var events = client.generate("a red potion").iterator();
        events.next();
        client.close();
        assertThrows(SafelightException.class, events::hasNext);
    }

    private static final class Reader implements Flow.Subscriber<Event> {
        private final BlockingQueue<String> signals = new LinkedBlockingQueue<>();
        private Flow.Subscription subscription;

        @Override
        public void onSubscribe(Flow.Subscription given) {
            subscription = given;
        }

        @Override
        public void onNext(Event event) {
            signals.add(event.getClass().getSimpleName());
        }

        @Override
        public void onError(Throwable failure) {
            signals.add(failure.getClass().getSimpleName());
        }

        @Override
        public void onComplete() {
            signals.add("complete");
        }
    }
}
