package io.github.safelight;

import io.github.safelight.v1.CancelGenerationRequest;
import io.github.safelight.v1.GenerateRequest;
import io.github.safelight.v1.Generation;
import io.github.safelight.v1.GenerationServiceGrpc;
import io.github.safelight.v1.GenerationSpec;
import io.github.safelight.v1.GetGenerationRequest;
import io.github.safelight.v1.Image;
import io.github.safelight.v1.ImageServiceGrpc;
import io.github.safelight.v1.ListModelsRequest;
import io.github.safelight.v1.ListModelsResponse;
import io.github.safelight.v1.Model;
import io.github.safelight.v1.ModelServiceGrpc;
import io.github.safelight.v1.PreviewPolicy;
import io.github.safelight.v1.UploadImageRequest;
import io.github.safelight.v1.UploadImageResponse;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptor;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.channel.ChannelOption;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/**
 * A connection to a server, or to several replicas of one. It is safe for use by several threads.
 *
 * <p>Its methods throw a {@link SafelightException} if the server refuses a call or cannot be reached.
 */
public final class SafelightClient implements AutoCloseable {
    /** The flow-control window. It is small, so that previews wait at the server, where newer ones replace older ones. */
    private static final int WINDOW_BYTES = 64 << 10;

    private static final int CONNECT_TIMEOUT_MS = 5_000;

    private final Servers servers;
    private final EventSubscription.Persistence persistence;

    SafelightClient(Servers servers, EventSubscription.Persistence persistence) {
        this.servers = servers;
        this.persistence = persistence;
    }

    /**
     * Makes a client without TLS and without an API key.
     *
     * @param target see {@link #builder}
     * @return the client; nothing is connected before the first call
     * @throws IllegalArgumentException if the target names no server
     */
    public static SafelightClient create(String target) {
        return builder(target).build();
    }

    /**
     * Starts building a client.
     *
     * @param target {@code "host:port"}. Several replicas are separated by commas: if one fails, the client calls the
     *     next one, which continues each generation that was accepted as replicated
     * @return a builder for the other arguments
     */
    public static Builder builder(String target) {
        return new Builder(target);
    }

    /** {@return the events of a generation of the prompt, with the default model and a random seed} */
    public Development generate(String prompt) {
        return generate(GenerateRequest.newBuilder()
                .setSpec(GenerationSpec.newBuilder().setPrompt(prompt))
                .build());
    }

    /**
     * Requests one or more pictures. A request without a request id gets one, so that it can be sent again without
     * running twice.
     *
     * @return its events; the request is sent when reading begins
     */
    public Development generate(GenerateRequest request) {
        return generate(request, null);
    }

    /**
     * Requests one or more pictures, with a deadline.
     *
     * @param timeout the time from the start of reading, over all connections; null: no deadline
     * @return its events; the request is sent when reading begins
     */
    public Development generate(GenerateRequest request, @Nullable Duration timeout) {
        GenerateRequest sent = request.getRequestId().isEmpty()
                ? request.toBuilder().setRequestId(UUID.randomUUID().toString()).build()
                : request;
        PreviewPolicy preview = request.hasPreview() ? request.getPreview() : null;
        return new Development(subscriber -> new EventSubscription(
                servers, persistence, sent, new Received("", preview), timeout, subscriber));
    }

    /**
     * Watches an existing generation, from its first event on.
     *
     * @param generation its name, {@code "generations/ID"}
     * @return its events; the request is sent when reading begins
     */
    public Development watch(String generation) {
        return watch(generation, null);
    }

    /**
     * Watches an existing generation, from its first event on.
     *
     * @param generation its name, {@code "generations/ID"}
     * @param preview which previews to send; null: the server's default
     * @return its events; the request is sent when reading begins
     */
    public Development watch(String generation, @Nullable PreviewPolicy preview) {
        return new Development(subscriber -> new EventSubscription(
                servers, persistence, null, new Received(generation, preview), null, subscriber));
    }

    /** {@return the present state of a generation, {@code "generations/ID"}} */
    public Generation get(String generation) {
        var request = GetGenerationRequest.newBuilder().setName(generation).build();
        return servers.ask(server -> GenerationServiceGrpc.newBlockingStub(server).getGeneration(request))
                .getGeneration();
    }

    /**
     * Stops a generation.
     *
     * @param generation its name, {@code "generations/ID"}
     * @return its final state, with the step that each output had reached
     */
    public Generation cancel(String generation) {
        var request = CancelGenerationRequest.newBuilder().setName(generation).build();
        return servers.ask(server -> GenerationServiceGrpc.newBlockingStub(server).cancelGeneration(request))
                .getGeneration();
    }

    /**
     * Uploads a picture: PNG, JPEG or WebP.
     *
     * @return its description. Its name can then be the {@code init_image} or the {@code mask} of a spec, for as
     *     long as the server keeps it
     */
    public Image uploadImage(byte[] data) {
        List<UploadImageRequest> pieces = Uploads.pieces(data);
        return servers.ask(server -> {
            var answer = new CompletableFuture<Image>();
            var upload = ImageServiceGrpc.newStub(server).uploadImage(new StreamObserver<UploadImageResponse>() {
                @Override
                public void onNext(UploadImageResponse response) {
                    answer.complete(response.getImage());
                }

                @Override
                public void onError(Throwable failure) {
                    answer.completeExceptionally(failure);
                }

                @Override
                public void onCompleted() {
                    answer.completeExceptionally(Status.INTERNAL.withDescription("no answer").asRuntimeException());
                }
            });
            pieces.forEach(upload::onNext);
            upload.onCompleted();
            try {
                return answer.join();
            } catch (CompletionException failure) {
                throw Status.fromThrowable(failure.getCause())
                        .asRuntimeException(Status.trailersFromThrowable(failure.getCause()));
            }
        });
    }

    /** {@return all models of the server} */
    public List<Model> models() {
        List<Model> models = new ArrayList<>();
        String token = "";
        do {
            var request = ListModelsRequest.newBuilder().setPageToken(token).build();
            ListModelsResponse page =
                    servers.ask(server -> ModelServiceGrpc.newBlockingStub(server).listModels(request));
            models.addAll(page.getModelsList());
            token = page.getNextPageToken();
        } while (!token.isEmpty());
        return List.copyOf(models);
    }

    /**
     * {@return the connection to the current server, for the stubs of {@code io.github.safelight.v1};
     * another one after a server has drained}
     */
    public Channel channel() {
        return servers.awake(servers.at());
    }

    /** Closes all connections. Generations that are being read end with an error. */
    @Override
    public void close() {
        servers.close();
    }

    /** The arguments of a client. */
    public static final class Builder {
        private final String target;
        private final List<ClientInterceptor> interceptors = new ArrayList<>();
        private ChannelCredentials credentials = InsecureChannelCredentials.create();
        private @Nullable String serverName;
        private String apiKey = "";
        private Duration patience = Duration.ofSeconds(60);
        private int retries = 3;
        private int maxMessageBytes = 4 << 20;

        private Builder(String target) {
            this.target = target;
        }

        /**
         * Sends a key as a bearer token; empty: none.
         *
         * @return this
         */
        public Builder apiKey(String key) {
            apiKey = key.strip();
            return this;
        }

        /**
         * Uses TLS, with {@code io.grpc.TlsChannelCredentials}. Without it the connection is plain text.
         *
         * @return this
         */
        public Builder credentials(ChannelCredentials given) {
            credentials = given;
            return this;
        }

        /**
         * The name in the server's certificate, if it is not the target's host.
         *
         * @return this
         */
        public Builder serverName(String name) {
            serverName = name;
            return this;
        }

        /**
         * How long the client tries to resume a generation after a lost connection, counted from its last event; 60
         * seconds by default. Before the first event it is at most 5 seconds.
         *
         * @return this
         */
        public Builder patience(Duration time) {
            patience = time;
            return this;
        }

        /**
         * How often a refused request is sent again if the refusal says after which time; 3 times by default. The client
         * waits for that time, within its patience and the deadline.
         *
         * @return this
         */
        public Builder retries(int times) {
            retries = times;
            return this;
        }

        /**
         * The largest message that is received, in bytes; 4 MiB by default.
         *
         * @return this
         */
        public Builder maxMessageBytes(int bytes) {
            maxMessageBytes = bytes;
            return this;
        }

        /**
         * Adds a gRPC interceptor, such as one for traces.
         *
         * @return this
         */
        public Builder intercept(ClientInterceptor interceptor) {
            interceptors.add(interceptor);
            return this;
        }

        /**
         * Makes the client. Nothing is connected before the first call.
         *
         * @return the client
         * @throws IllegalArgumentException if an argument cannot be used
         */
        public SafelightClient build() {
            if (!apiKey.chars().allMatch(letter -> letter >= '!' && letter <= '~')) {
                throw new IllegalArgumentException("the API key must be visible ASCII characters");
            }
            List<String> targets = List.of(target.split(",", -1)).stream().map(String::strip).toList();
            if (targets.contains("")) {
                throw new IllegalArgumentException("target \"" + target + "\" names no server");
            }
            Builder given = copy(); // connections are also made later, when this builder may have changed
            var servers = new Servers(targets.stream()
                    .<Supplier<ManagedChannel>>map(one -> () -> given.connect(one))
                    .toList());
            return new SafelightClient(servers, new EventSubscription.Persistence(patience, retries));
        }

        private Builder copy() {
            var copy = new Builder(target);
            copy.interceptors.addAll(interceptors);
            copy.credentials = credentials;
            copy.serverName = serverName;
            copy.apiKey = apiKey;
            copy.maxMessageBytes = maxMessageBytes;
            return copy;
        }

        private ManagedChannel connect(String one) {
            NettyChannelBuilder channel = NettyChannelBuilder.forTarget(one, credentials)
                    .flowControlWindow(WINDOW_BYTES)
                    .maxInboundMessageSize(maxMessageBytes)
                    // While a stream is open, a server that is frozen is noticed within 15 seconds.
                    .keepAliveTime(10, TimeUnit.SECONDS)
                    .keepAliveTimeout(5, TimeUnit.SECONDS)
                    .withOption(ChannelOption.CONNECT_TIMEOUT_MILLIS, CONNECT_TIMEOUT_MS)
                    .disableServiceConfigLookUp()
                    .intercept(interceptors);
            if (serverName != null && !serverName.isEmpty()) {
                channel.overrideAuthority(serverName);
            }
            if (!apiKey.isEmpty()) {
                var headers = new Metadata();
                headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + apiKey);
                channel.intercept(MetadataUtils.newAttachHeadersInterceptor(headers));
            }
            if (isLocal(one)) {
                channel.proxyDetector(address -> null);
            }
            return channel.build();
        }
    }

    /** Whether a target is on this machine: a Unix socket, localhost or a loopback address. */
    static boolean isLocal(String target) {
        if (target.startsWith("unix:")) {
            return true;
        }
        String address = target.replaceFirst("^dns:(//[^/]*/)?", "");
        String host = address.startsWith("[") ? address.replaceFirst("\\].*", "]") : address.replaceFirst(":.*", "");
        return host.equals("localhost") || host.endsWith(".localhost") || host.equals("[::1]")
                || host.matches("127(\\.\\d{1,3}){3}");
    }
}
