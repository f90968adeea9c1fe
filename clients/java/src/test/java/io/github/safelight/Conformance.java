package io.github.safelight;

import com.google.gson.FieldNamingPolicy;
import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonObject;
import com.google.protobuf.util.JsonFormat;
import io.github.safelight.v1.GenerateRequest;
import io.github.safelight.v1.Generation;
import io.github.safelight.v1.Model;
import io.github.safelight.v1.OutputState;
import io.github.safelight.v1.PreviewMethod;
import io.github.safelight.v1.PreviewPolicy;
import io.grpc.TlsChannelCredentials;
import java.io.BufferedReader;
import java.io.File;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.time.Duration;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.Callable;
import java.util.concurrent.Executors;
import org.jspecify.annotations.Nullable;

/**
 * The runner of the Java client: reads cases, runs them, and prints the outcomes, a JSON object a line each.
 *
 * <p>See clients/CONFORMANCE.md.
 */
final class Conformance {
    record Case(
            String name, List<String> targets, String caFile, String certFile, String keyFile, String serverName,
            String apiKey, List<JsonObject> requests, double timeoutS, double patienceS, int retries,
            int maxMessageBytes, double pauseS, int cancelAtStep, boolean watchAgain, String initImageFile,
            String maskFile, List<Float> guidanceInterval, float guidanceRescale, int minNumSteps, boolean measure) {}

    record Report(@com.google.gson.annotations.SerializedName("case") String name, List<Seen> generations) {}

    record Image(
            int outputIndex, String mediaType, int widthPx, int heightPx, int strideBytes, int step, int numBytes,
            int numDropped, String seed, String sha256) {}

    record Cancelled(String state, List<Integer> steps) {}

    record Watched(List<String> reliable, List<String> sha256, String state, List<String> models) {}

    /** The outcome of one generation. */
    static final class Seen {
        String code = "OK";
        String reason = "";
        Map<String, String> violations = Map.of();
        @Nullable Double retryAfterS;
        String message = "";
        String generation = "";
        List<String> reliable = new ArrayList<>();
        List<int[]> steps = new ArrayList<>();
        List<Image> previews = new ArrayList<>();
        List<Image> pictures = new ArrayList<>();
        long numSteps;
        @Nullable Cancelled cancelled;
        @Nullable Watched watched;
        List<Long> receivedUs = new ArrayList<>();
    }

    private final Case given;
    private final SafelightClient client;

    private Conformance(Case given, SafelightClient client) {
        this.given = given;
        this.client = client;
    }

    public static void main(String[] arguments) throws Exception {
        Gson json = new GsonBuilder()
                .setFieldNamingPolicy(FieldNamingPolicy.LOWER_CASE_WITH_UNDERSCORES)
                .serializeNulls()
                .create();
        var lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            System.out.println(json.toJson(run(json.fromJson(line, Case.class))));
        }
    }

    private static Report run(Case given) throws Exception {
        var builder = SafelightClient.builder(String.join(",", given.targets()))
                .apiKey(given.apiKey())
                .serverName(given.serverName())
                .patience(seconds(given.patienceS()))
                .retries(given.retries());
        if (!given.caFile().isEmpty()) {
            builder.credentials(credentials(given));
        }
        if (given.maxMessageBytes() > 0) {
            builder.maxMessageBytes(given.maxMessageBytes());
        }
        try (SafelightClient client = builder.build()) {
            var runner = new Conformance(given, client);
            var pool = Executors.newFixedThreadPool(given.requests().size());
            List<Callable<Seen>> calls = new ArrayList<>();
            given.requests().forEach(request -> calls.add(() -> runner.generate(request)));
            List<Seen> all = new ArrayList<>();
            for (var done : pool.invokeAll(calls)) {
                all.add(done.get());
            }
            pool.shutdown();
            return new Report(given.name(), all);
        }
    }

    private static io.grpc.ChannelCredentials credentials(Case given) throws Exception {
        var tls = TlsChannelCredentials.newBuilder().trustManager(new File(given.caFile()));
        if (given.certFile() != null && !given.certFile().isEmpty()) {
            tls.keyManager(new File(given.certFile()), new File(given.keyFile()));
        }
        return tls.build();
    }

    private Seen generate(JsonObject message) throws Exception {
        var request = GenerateRequest.newBuilder();
        JsonFormat.parser().merge(message.toString(), request);
        if (!given.initImageFile().isEmpty()) {
            request.getSpecBuilder().setInitImage(upload(given.initImageFile())).setMask(upload(given.maskFile()));
        }
        if (!given.guidanceInterval().isEmpty()) {
            request.getSpecBuilder().setGuidanceRescale(given.guidanceRescale());
            request.getSpecBuilder()
                    .getGuidanceIntervalBuilder()
                    .setStart(given.guidanceInterval().get(0))
                    .setEnd(given.guidanceInterval().get(1));
        }
        if (given.minNumSteps() > 0) {
            request.getQualityFloorBuilder().setMinNumSteps(given.minNumSteps());
        }
        var seen = new Seen();
        Duration timeout = given.timeoutS() > 0 ? seconds(given.timeoutS()) : null;
        try (Development development = client.generate(request.build(), timeout)) {
            for (Event event : development) {
                see(event, seen);
            }
        } catch (SafelightException failure) {
            fail(failure, seen);
        }
        if (given.watchAgain() && seen.code.equals("OK")) {
            seen.watched = watchAgain(seen.generation);
        }
        return seen;
    }

    /** Uploads the picture in a file and returns its name. */
    private String upload(String file) throws Exception {
        return client.uploadImage(Files.readAllBytes(Path.of(file))).getName();
    }

    private void see(Event event, Seen seen) throws Exception {
        if (event instanceof Event.Accepted accepted) {
            seen.generation = accepted.generation();
            seen.reliable.add("accepted");
        } else if (event instanceof Event.Progress progress) {
            seen.steps.add(new int[] {progress.outputIndex(), progress.step()});
            if (given.cancelAtStep() > 0 && progress.step() >= given.cancelAtStep() && seen.cancelled == null) {
                Generation ended = client.cancel(seen.generation);
                List<Integer> steps = ended.getOutputsList().stream().map(OutputState::getStep).toList();
                seen.cancelled = new Cancelled(ended.getState().name(), steps);
            }
        } else if (event instanceof Event.Preview && given.measure()) {
            seen.receivedUs.add(ChronoUnit.MICROS.between(Instant.EPOCH, Instant.now()));
        } else if (event instanceof Event.Preview preview) {
            seen.previews.add(image(preview, preview.step(), preview.numDropped(), 0));
            Thread.sleep((long) (1000 * given.pauseS()));
        } else if (event instanceof Event.Picture picture) {
            seen.reliable.add("picture");
            seen.pictures.add(image(picture, 0, 0, picture.seed()));
        } else if (event instanceof Event.Finished finished) {
            seen.reliable.add("finished");
            seen.numSteps = finished.message().getUsage().getNumSteps();
        }
    }

    /** Watches a generation again: the events, and what the server reports about the generation and its models. */
    private Watched watchAgain(String name) throws Exception {
        List<String> reliable = new ArrayList<>();
        Map<Integer, String> sums = new TreeMap<>();
        var none = PreviewPolicy.newBuilder().setMethod(PreviewMethod.PREVIEW_METHOD_NONE).build();
        try (var events = client.watch(name, none).stream()) {
            for (Event event : (Iterable<Event>) events::iterator) {
                if (event instanceof Event.Accepted) {
                    reliable.add("accepted");
                } else if (event instanceof Event.Picture picture) {
                    reliable.add("picture");
                    sums.put(picture.outputIndex(), sha256(picture));
                } else if (event instanceof Event.Finished) {
                    reliable.add("finished");
                }
            }
        }
        List<String> models = client.models().stream().map(Model::getName).toList();
        return new Watched(reliable, List.copyOf(sums.values()), client.get(name).getState().name(), models);
    }

    private static void fail(SafelightException failure, Seen seen) {
        seen.code = failure.getCode().name();
        seen.reason = failure.getReason();
        seen.violations = failure.getViolations();
        seen.message = failure.getMessage();
        Duration after = failure.getRetryAfter();
        seen.retryAfterS = after == null ? null : after.toNanos() / 1e9;
    }

    private static Image image(Event.Image image, int step, int numDropped, long seed) throws Exception {
        return new Image(
                image.outputIndex(), image.mediaType(), image.widthPx(), image.heightPx(), image.strideBytes(), step,
                image.data().size(), numDropped, Long.toUnsignedString(seed), sha256(image));
    }

    private static String sha256(Event.Image image) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(image.data().toByteArray()));
    }

    private static Duration seconds(double time) {
        return Duration.ofNanos((long) (time * 1e9));
    }
}
