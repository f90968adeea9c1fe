package io.github.safelight;

import io.github.safelight.v1.GenerateRequest;
import io.github.safelight.v1.GenerateResponse;
import io.github.safelight.v1.GenerationEvent;
import io.github.safelight.v1.GenerationServiceGrpc;
import io.github.safelight.v1.WatchGenerationResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.time.Duration;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;
import org.jspecify.annotations.Nullable;

/**
 * Follows one generation over as many connections as necessary, and gives a subscriber the events that it requests.
 *
 * <p>A message is requested from gRPC only while the subscriber has requested an event, so that at most one window of
 * bytes waits here. There is one connection at a time, so its callbacks run in order; only {@link #request} and
 * {@link #cancel} are called from other threads.
 */
final class EventSubscription implements Flow.Subscription {
    /** While no event was received, so that a wrong address fails soon. */
    private static final Duration FIRST_PATIENCE = Duration.ofSeconds(5);

    private static final Duration FIRST_WAIT = Duration.ofMillis(100);
    private static final Duration MAX_WAIT = Duration.ofSeconds(2);

    /** After these reasons the same generation can be resumed; "" is a lost connection. */
    private static final Set<String> RESUMABLE = Set.of("", "WATCHER_STALLED", "MOVED", "OTHER_MODEL");

    /** After these reasons the same call can succeed at another replica. */
    private static final Set<String> ELSEWHERE = Set.of("DRAINING", "UNAVAILABLE");

    /** Reason of a server that accepts no new requests. */
    private static final String DRAINING = "DRAINING";

    /** How long and how often a client retries. */
    record Persistence(Duration patience, int retries) {}

    private final Servers servers;
    private final Persistence persistence;
    private final @Nullable GenerateRequest request;
    private final Received received;
    private final CallOptions options;
    private final Flow.Subscriber<? super Event> subscriber;
    private final Context context = Context.current();

    // Used by the callbacks of connections only, which run one after the other.
    private int asked;
    private int tries;
    private int refusals;
    private int drains;
    private int numEvents;
    private long giveUpAt;

    // Guarded by this.
    private long demand;
    private boolean awaiting;
    private boolean ended;
    private @Nullable RuntimeException fault;
    private @Nullable ClientCall<?, ?> call;
    private @Nullable Channel server;

    /** @param request null: watches the generation that {@code received} names */
    EventSubscription(
            Servers servers, Persistence persistence, @Nullable GenerateRequest request, Received received,
            @Nullable Duration timeout, Flow.Subscriber<? super Event> subscriber) {
        this.servers = servers;
        this.persistence = persistence;
        this.request = request;
        this.received = received;
        this.subscriber = subscriber;
        this.options = timeout == null
                ? CallOptions.DEFAULT
                : CallOptions.DEFAULT.withDeadline(Deadline.after(timeout.toNanos(), TimeUnit.NANOSECONDS));
        this.asked = servers.at();
        this.giveUpAt = System.nanoTime() + min(FIRST_PATIENCE, persistence.patience()).toNanos();
    }

    @Override
    public void request(long n) {
        synchronized (this) {
            if (n <= 0) {
                fault = new IllegalArgumentException("request(" + n + "): ask for at least one event");
            }
            demand = demand + n < 0 ? Long.MAX_VALUE : demand + n;
            if (fault != null && call != null) {
                call.cancel(fault.getMessage(), null); // its end notifies the subscriber, after the events before it
                return;
            }
        }
        pull();
    }

    /** Ends the stream. If it was the last one, the server suspends the generation and cancels it after its grace period. */
    @Override
    public void cancel() {
        synchronized (this) {
            ended = true;
            if (call != null) {
                call.cancel("nobody watches any more", null);
            }
        }
    }

    /** Starts the generation, or resumes it if it has a name already. */
    void open() {
        if (received.name().isEmpty() && request != null) {
            open(GenerationServiceGrpc.getGenerateMethod(), request, GenerateResponse::getEvent);
        } else {
            var method = GenerationServiceGrpc.getWatchGenerationMethod();
            open(method, received.watch(), WatchGenerationResponse::getEvent);
        }
    }

    private <Q, R> void open(MethodDescriptor<Q, R> method, Q message, Function<R, GenerationEvent> eventOf) {
        var listener = new ClientCall.Listener<R>() {
            @Override
            public void onMessage(R response) {
                take(eventOf.apply(response));
            }

            @Override
            public void onClose(Status status, Metadata trailers) {
                closed(status, trailers);
            }
        };
        synchronized (this) {
            if (ended) {
                return;
            }
            if (fault == null) {
                server = servers.awake(asked);
                ClientCall<Q, R> next = server.newCall(method, options);
                next.start(listener, new Metadata());
                next.sendMessage(message);
                next.halfClose();
                call = next;
                awaiting = false;
                pull();
                return;
            }
        }
        end(fault);
    }

    /** Requests the next message if the subscriber has requested an event. */
    private synchronized void pull() {
        if (!ended && call != null && demand > 0 && !awaiting) {
            awaiting = true;
            call.request(1);
        }
    }

    private void take(GenerationEvent message) {
        synchronized (this) {
            if (ended) {
                return;
            }
            awaiting = false;
        }
        Event event;
        try {
            event = received.take(message);
        } catch (SafelightException damage) {
            synchronized (this) {
                fault = damage;
                if (call != null) {
                    call.cancel(damage.getMessage(), damage);
                }
            }
            return;
        }
        if (event != null) {
            synchronized (this) {
                demand -= demand == Long.MAX_VALUE ? 0 : 1;
            }
            subscriber.onNext(event);
        }
        pull();
    }

    private void closed(Status status, Metadata trailers) {
        RuntimeException misused;
        synchronized (this) {
            call = null;
            misused = fault;
        }
        if (misused != null) {
            end(misused);
        } else if (!status.isOk()) {
            askAgain(SafelightException.of(SafelightException.lostOrSaid(status, trailers, context), trailers));
        } else if (received.isFinished()) {
            end(null);
        } else {
            String generation = received.name().isEmpty() ? "the generation" : received.name();
            askAgain(SafelightException.of(
                    Status.UNAVAILABLE.withDescription(
                            "the stream of " + generation + " ended before the generation had finished"),
                    null));
        }
    }

    /** Retries at this server or the next one after a pause, or ends with the failure. */
    private void askAgain(SafelightException failure) {
        long now = System.nanoTime();
        if (received.numEvents() > numEvents) {
            tries = 0;
            refusals = 0;
            drains = 0;
            numEvents = received.numEvents();
            giveUpAt = now + persistence.patience().toNanos();
        }
        boolean goesOnElsewhere = received.isDurable() || received.name().isEmpty();
        boolean movable = servers.size() > 1 && goesOnElsewhere;
        boolean draining = failure.getReason().equals(DRAINING);
        if (draining) {
            servers.giveUp(asked, usedServer());
            if (drains == 0) {
                giveUpAt = now + persistence.patience().toNanos();
            }
            drains++;
        }
        long wait;
        if (isResumable(failure, movable)) {
            Duration longest = min(MAX_WAIT, FIRST_WAIT.multipliedBy(1L << Math.min(tries, 10)));
            wait = scaled(longest, 0.5, 1);
            tries++;
        } else if (draining && goesOnElsewhere) {
            Duration after = failure.getRetryAfter();
            wait = scaled(after == null ? FIRST_WAIT : after, 1, 1.2);
        } else if (isRefusedForNow(failure) && refusals < persistence.retries()) {
            if (refusals == 0) {
                giveUpAt = now + persistence.patience().toNanos();
            }
            wait = scaled(failure.getRetryAfter(), 1, 1.2); // clients must not all retry at the same moment
            refusals++;
        } else {
            end(failure);
            return;
        }
        Deadline deadline = options.getDeadline();
        long left = deadline == null ? Long.MAX_VALUE : Math.max(0, deadline.timeRemaining(TimeUnit.NANOSECONDS));
        if (now + wait - giveUpAt > 0 || failure.getRetryAfter() != null && wait > left || servers.isClosed()) {
            end(failure);
            return;
        }
        if (movable && !failure.getReason().equals("WATCHER_STALLED")) {
            asked = servers.next(asked);
        }
        // On the timer's own thread, since it only starts a call; a pool may be full of blocked readers.
        CompletableFuture.delayedExecutor(Math.min(wait, left), TimeUnit.NANOSECONDS, Runnable::run)
                .execute(this::open);
    }

    private synchronized @Nullable Channel usedServer() {
        return server;
    }

    /** Whether the same generation can be resumed; {@code movable}: another server can continue it. */
    private static boolean isResumable(SafelightException failure, boolean movable) {
        return failure.getCode() == Status.Code.UNAVAILABLE
                && (RESUMABLE.contains(failure.getReason()) || movable && ELSEWHERE.contains(failure.getReason()));
    }

    /** Whether the server has said when to retry, and nothing has started. */
    private boolean isRefusedForNow(SafelightException failure) {
        return failure.getRetryAfter() != null
                && (failure.getCode() == Status.Code.RESOURCE_EXHAUSTED || received.name().isEmpty());
    }

    private void end(@Nullable RuntimeException failure) {
        synchronized (this) {
            if (ended) {
                return;
            }
            ended = true;
        }
        if (failure == null) {
            subscriber.onComplete();
        } else {
            subscriber.onError(failure);
        }
    }

    private static long scaled(Duration wait, double least, double most) {
        return (long) (wait.toNanos() * ThreadLocalRandom.current().nextDouble(least, most));
    }

    private static Duration min(Duration one, Duration other) {
        return one.compareTo(other) < 0 ? one : other;
    }
}
