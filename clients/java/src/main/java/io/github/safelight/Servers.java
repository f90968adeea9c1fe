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
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.Function;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/** The replicas of a client, in their order, and which of them new calls use. */
final class Servers implements AutoCloseable {
    private static final Duration CONNECT_TIMEOUT = Duration.ofSeconds(5);

    private final List<Supplier<ManagedChannel>> connect;
    private final Duration connectTimeout;
    private final AtomicInteger at = new AtomicInteger();

    // Guarded by this.
    private final List<Connection> connections;
    private final Set<ManagedChannel> givenUp = new HashSet<>();
    private boolean closed;

    /** The connection to a server, plain and with a time limit for the server's answer to the connection. */
    private record Connection(ManagedChannel channel, Channel bounded) {}

    /** @param connect makes a connection to a server; called again when a connection is replaced */
    Servers(List<Supplier<ManagedChannel>> connect, Duration connectTimeout) {
        this.connect = List.copyOf(connect);
        this.connectTimeout = connectTimeout;
        this.connections = new ArrayList<>(connect.stream().map(this::connection).toList());
    }

    Servers(List<Supplier<ManagedChannel>> connect) {
        this(connect, CONNECT_TIMEOUT);
    }

    private Connection connection(Supplier<ManagedChannel> made) {
        ManagedChannel channel = made.get();
        return new Connection(channel, ClientInterceptors.intercept(channel, new ConnectBound(channel, connectTimeout)));
    }

    int size() {
        return connect.size();
    }

    /** The index of the server that new calls use. */
    int at() {
        return at.get();
    }

    /** A server for a call that begins now. If it could not be reached before, the connection is tried again at once. */
    synchronized Channel awake(int index) {
        Connection connection = connections.get(index);
        // gRPC would wait up to two minutes before it connects again; this client has its own waiting times.
        if (connection.channel().getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
            connection.channel().enterIdle();
        }
        return connection.bounded();
    }

    /**
     * Makes new calls use a new connection, which a load balancer may lead to another server; open calls stay on the old
     * one. Generations that are refused at the same time replace a connection only once.
     *
     * @param used the connection that {@link #awake} returned
     */
    synchronized void giveUp(int index, @Nullable Channel used) {
        Connection old = connections.get(index);
        if (closed || old.bounded() != used) {
            return;
        }
        connections.set(index, connection(connect.get(index)));
        old.channel().shutdown();
        givenUp.removeIf(ManagedChannel::isTerminated);
        givenUp.add(old.channel());
    }

    synchronized boolean isClosed() {
        return closed;
    }

    /**
     * The server to use after one that failed. Generations that lose a server at the same time move to the same next
     * one, and only the first of them changes the server of new calls.
     */
    int next(int failed) {
        int after = (failed + 1) % size();
        at.compareAndSet(failed, after);
        return after;
    }

    /** Makes a call at the current server; if that cannot be reached, at the next ones in turn. */
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
        var all = new ArrayList<ManagedChannel>();
        synchronized (this) {
            closed = true;
            connections.forEach(connection -> all.add(connection.channel()));
            all.addAll(givenUp);
        }
        all.forEach(ManagedChannel::shutdownNow);
    }

    /**
     * Ends calls whose server accepts the TCP connection but does not answer. gRPC limits only the time of the TCP
     * connection, and its keepalive begins after the server's first answer.
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
                            channel.enterIdle(); // so that the next attempt makes a new connection
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
