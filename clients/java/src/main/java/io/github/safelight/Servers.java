package io.github.safelight;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.ClientStreamTracer;
import io.grpc.ConnectivityState;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.ForwardingClientCallListener.SimpleForwardingClientCallListener;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.Function;

/** The replicas that a client asks, in their order, and which of them new calls ask. */
final class Servers implements AutoCloseable {
    private static final Duration CONNECT_TIMEOUT = Duration.ofSeconds(5);

    private final List<ManagedChannel> channels;
    private final List<Channel> bounded;
    private final AtomicInteger at = new AtomicInteger();

    Servers(List<ManagedChannel> channels, Duration connectTimeout) {
        this.channels = List.copyOf(channels);
        this.bounded = channels.stream()
                .map(channel -> ClientInterceptors.intercept(channel, new ConnectBound(channel, connectTimeout)))
                .toList();
    }

    Servers(List<ManagedChannel> channels) {
        this(channels, CONNECT_TIMEOUT);
    }

    int size() {
        return channels.size();
    }

    /** The index of the server that new calls ask. */
    int at() {
        return at.get();
    }

    /** A server for a call that begins now: it is connected to anew if it could not be reached before. */
    Channel awake(int index) {
        ManagedChannel channel = channels.get(index);
        // gRPC would wait for up to two minutes before it connects again. This client has waiting times of its own.
        if (channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
            channel.enterIdle();
        }
        return bounded.get(index);
    }

    boolean isClosed(int index) {
        return channels.get(index).isShutdown();
    }

    /**
     * The server to ask after one that failed. Generations that lose a server together step to the same next one; new
     * calls follow the first of them only.
     */
    int next(int failed) {
        int after = (failed + 1) % size();
        at.compareAndSet(failed, after);
        return after;
    }

    /** Makes a call at the current server, and at each next one while one cannot be reached. */
    <T> T ask(Function<Channel, T> call) {
        for (int left = size() - 1; ; left--) {
            int asked = at();
            try {
                return call.apply(awake(asked));
            } catch (StatusRuntimeException failure) {
                SafelightException told = SafelightException.of(failure);
                if (told.getCode() != Status.Code.UNAVAILABLE || left == 0) {
                    throw told;
                }
                next(asked);
            }
        }
    }

    @Override
    public void close() {
        channels.forEach(ManagedChannel::shutdownNow);
    }

    /**
     * Ends calls whose server takes the connection and does not answer it. gRPC bounds the answer to the TCP connection
     * only, and its keepalive begins when the server has answered.
     */
    private record ConnectBound(ManagedChannel channel, Duration timeout) implements ClientInterceptor {
        @Override
        public <Q, R> ClientCall<Q, R> interceptCall(
                MethodDescriptor<Q, R> method, CallOptions options, Channel next) {
            var connected = new CompletableFuture<Boolean>();
            var tracers = new ClientStreamTracer.Factory() {
                @Override
                public ClientStreamTracer newClientStreamTracer(ClientStreamTracer.StreamInfo info, Metadata headers) {
                    return new ClientStreamTracer() {
                        @Override
                        public void streamCreated(io.grpc.Attributes transport, Metadata sent) {
                            connected.complete(true);
                        }
                    };
                }
            };
            ClientCall<Q, R> call = next.newCall(method, options.withStreamTracerFactory(tracers));
            return new SimpleForwardingClientCall<>(call) {
                @Override
                public void start(Listener<R> listener, Metadata headers) {
                    super.start(
                            new SimpleForwardingClientCallListener<>(listener) {
                                @Override
                                public void onClose(Status status, Metadata trailers) {
                                    boolean late = connected.isCompletedExceptionally();
                                    connected.complete(false);
                                    super.onClose(late ? unanswered(status) : status, trailers);
                                }
                            },
                            headers);
                }

                @Override
                public void halfClose() {
                    super.halfClose(); // nothing may be sent after a cancel, so the time begins here
                    connected.orTimeout(timeout.toNanos(), TimeUnit.NANOSECONDS).exceptionally(late -> {
                        if (channel.getState(false) == ConnectivityState.CONNECTING) {
                            channel.enterIdle(); // the next try makes a connection of its own
                        }
                        cancel("the connection was not answered", late);
                        return false;
                    });
                }
            };
        }

        private Status unanswered(Status status) {
            return status.getCode() != Status.Code.CANCELLED
                    ? status
                    : Status.UNAVAILABLE.withDescription(
                            "no answer to the connection within " + timeout.toSeconds() + " s");
        }
    }
}
