package io.github.safelight;

import java.util.ArrayList;
import java.util.Comparator;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Spliterator;
import java.util.Spliterators;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Function;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;
import org.jspecify.annotations.Nullable;

/**
 * The events of one generation. They can be read once: in a loop, as a stream, by a subscriber, or only the pictures.
 *
 * <p>The request is sent when reading begins. A slow reader gets fewer and newer previews: they wait at the server, and
 * at most 64 KiB are in transit. Closing it before its end tells the server that nobody watches: the generation is
 * suspended, and cancelled after the grace period of its disconnect policy.
 */
public final class Development implements Iterable<Event>, Flow.Publisher<Event>, AutoCloseable {
    private static final Runnable UNREAD = () -> {};

    private final Function<Flow.Subscriber<? super Event>, EventSubscription> subscribe;
    private final AtomicReference<Runnable> closing = new AtomicReference<>(UNREAD);

    Development(Function<Flow.Subscriber<? super Event>, EventSubscription> subscribe) {
        this.subscribe = subscribe;
    }

    /**
     * Gives the events to a subscriber, as it requests them, on gRPC's threads. An error is a
     * {@link SafelightException}.
     */
    @Override
    public void subscribe(Flow.Subscriber<? super Event> subscriber) {
        EventSubscription subscription = subscribe.apply(subscriber);
        if (closing.compareAndSet(UNREAD, subscription::cancel)) {
            subscriber.onSubscribe(subscription);
            subscription.open();
        } else {
            subscriber.onSubscribe(new NothingToRead());
            subscriber.onError(readTwice());
        }
    }

    /**
     * Blocks in {@code hasNext} until the next event. Both methods throw a {@link SafelightException} if the
     * generation fails. Close this if you leave the loop before its end, best with {@code try (...)}.
     *
     * @throws IllegalStateException if it was read or closed before
     */
    @Override
    public Iterator<Event> iterator() {
        var events = new BlockingEvents();
        EventSubscription subscription = subscribe.apply(events);
        begin(() -> {
            subscription.cancel();
            events.onComplete();
        });
        events.onSubscribe(subscription);
        subscription.open();
        return events;
    }

    /** {@return the events as a stream, whose {@code close} closes this} */
    public Stream<Event> stream() {
        int kind = Spliterator.ORDERED | Spliterator.NONNULL;
        return StreamSupport.stream(Spliterators.spliteratorUnknownSize(iterator(), kind), false)
                .onClose(this::close);
    }

    /**
     * Receives all pictures, in the order of the outputs. The future fails with a {@link SafelightException}; cancelling it
     * closes this.
     *
     * @return the pictures, completed after the last one was received
     */
    public CompletableFuture<List<Event.Picture>> pictures() {
        return collect(Function.identity());
    }

    /**
     * Receives all pictures. The future fails with a {@link SafelightException}; cancelling it closes this.
     *
     * @return the picture of the first output, completed after the last picture was received
     */
    public CompletableFuture<Event.Picture> picture() {
        return collect(pictures -> pictures.get(0));
    }

    private <T> CompletableFuture<T> collect(Function<List<Event.Picture>, T> result) {
        var future = new CompletableFuture<T>();
        var subscription = subscribe.apply(new PictureCollector<>(result, future));
        begin(() -> {
            subscription.cancel();
            future.cancel(false);
        });
        future.whenComplete((done, failure) -> subscription.cancel());
        subscription.request(Long.MAX_VALUE);
        subscription.open();
        return future;
    }

    /** Ends the stream: a loop that reads it ends, a future is cancelled, a subscriber gets no further calls. */
    @Override
    public void close() {
        Runnable ending = closing.getAndSet(() -> {});
        ending.run();
    }

    private void begin(Runnable close) {
        if (!closing.compareAndSet(UNREAD, close)) {
            throw readTwice();
        }
    }

    private static IllegalStateException readTwice() {
        return new IllegalStateException("a development is read once: ask the client for another, or watch it");
    }

    private static final class NothingToRead implements Flow.Subscription {
        @Override
        public void request(long n) {}

        @Override
        public void cancel() {}
    }

    private static final class PictureCollector<T> implements Flow.Subscriber<Event> {
        private final List<Event.Picture> pictures = new ArrayList<>();
        private final Function<List<Event.Picture>, T> result;
        private final CompletableFuture<T> future;

        PictureCollector(Function<List<Event.Picture>, T> result, CompletableFuture<T> future) {
            this.result = result;
            this.future = future;
        }

        @Override
        public void onSubscribe(Flow.Subscription subscription) {}

        @Override
        public void onNext(Event event) {
            if (event instanceof Event.Picture picture) {
                pictures.add(picture);
            }
        }

        @Override
        public void onError(Throwable failure) {
            future.completeExceptionally(failure);
        }

        @Override
        public void onComplete() {
            pictures.sort(Comparator.comparingInt(Event.Picture::outputIndex));
            future.complete(result.apply(List.copyOf(pictures)));
        }
    }

    private static final class BlockingEvents implements Iterator<Event>, Flow.Subscriber<Event> {
        private record Signal(@Nullable Event event, @Nullable Throwable failure) {}

        private final BlockingQueue<Signal> signals = new LinkedBlockingQueue<>();
        private Flow.@Nullable Subscription subscription;
        private @Nullable Signal next;

        @Override
        public void onSubscribe(Flow.Subscription given) {
            subscription = given;
        }

        @Override
        public void onNext(Event event) {
            signals.add(new Signal(event, null));
        }

        @Override
        public void onError(Throwable failure) {
            signals.add(new Signal(null, failure));
        }

        @Override
        public void onComplete() {
            signals.add(new Signal(null, null));
        }

        @Override
        public boolean hasNext() {
            if (next == null) {
                next = await();
            }
            if (next.failure() instanceof RuntimeException failure) {
                failure.fillInStackTrace(); // the reader's stack trace, not that of a gRPC thread
                throw failure;
            }
            return next.event() != null;
        }

        @Override
        public Event next() {
            if (!hasNext() || next == null || next.event() == null) {
                throw new NoSuchElementException();
            }
            Event event = next.event();
            next = null;
            return event;
        }

        private Signal await() {
            try {
                subscription.request(1);
                return signals.take();
            } catch (InterruptedException interrupted) {
                subscription.cancel();
                Thread.currentThread().interrupt();
                return new Signal(null, SafelightException.interrupted(interrupted));
            }
        }
    }
}
