package io.github.safelight;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNotSame;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.StatusProto;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.util.List;
import java.util.Map;
import java.util.function.Supplier;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;

final class SafelightClientTest {
    @Test
    void targetsOfThisMachine() {
        List<String> local = List.of(
                "127.0.0.1:8421", "localhost:8421", "[::1]:8421", "dns:///localhost:8421", "a.localhost:1", "127.0.0.2",
                "unix:/run/safelight.sock");
        List<String> elsewhere =
                List.of("safelight.example:8421", "10.0.0.1:8421", "[2001:db8::1]:8421", "127.example:1");
        local.forEach(target -> assertTrue(SafelightClient.isLocal(target), target));
        elsewhere.forEach(target -> assertFalse(SafelightClient.isLocal(target), target));
    }

    @Test
    void argumentsThatCannotBeUsed() {
        for (String target : List.of("", " ", "a:1,")) {
            assertThrows(IllegalArgumentException.class, () -> SafelightClient.create(target), target);
        }
        var builder = SafelightClient.builder("a:1").apiKey("a b");
        assertThrows(IllegalArgumentException.class, builder::build);
    }

    @Test
    void generationsThatLoseAServerTogetherAskTheNextOne() {
        List<Supplier<ManagedChannel>> connect = IntStream.range(0, 3)
                .<Supplier<ManagedChannel>>mapToObj(
                        index -> () -> InProcessChannelBuilder.forName("nobody-" + index).build())
                .toList();
        try (var servers = new Servers(connect)) {
            for (int generation = 0; generation < 24; generation++) {
                assertEquals(1, servers.next(0));
            }
            assertEquals(1, servers.at(), "new calls follow the first of them only");
        }
    }

    @Test
    void generationsThatAreRefusedTogetherReplaceTheirConnectionOnce() {
        Supplier<ManagedChannel> connect = () -> InProcessChannelBuilder.forName("nobody").build();
        try (var servers = new Servers(List.of(connect))) {
            var draining = servers.awake(0);
            servers.giveUp(0, draining);
            var fresh = servers.awake(0);
            assertNotSame(draining, fresh);
            servers.giveUp(0, draining);
            assertSame(fresh, servers.awake(0));
        }
    }

    @Test
    void errorsAreReadable() {
        var invalid = BadRequest.FieldViolation.newBuilder().setField("spec.model").setDescription("x");
        StatusRuntimeException full = StatusProto.toStatusRuntimeException(com.google.rpc.Status.newBuilder()
                .setCode(Status.Code.RESOURCE_EXHAUSTED.value())
                .setMessage("the queue is full")
                .addDetails(Any.pack(ErrorInfo.newBuilder().setReason("QUEUE_FULL").build()))
                .addDetails(Any.pack(BadRequest.newBuilder().addFieldViolations(invalid).build()))
                .addDetails(Any.pack(RetryInfo.newBuilder()
                        .setRetryDelay(Duration.newBuilder().setSeconds(3).setNanos(5))
                        .build()))
                .build());
        SafelightException failure = SafelightException.of(full);
        assertEquals(Status.Code.RESOURCE_EXHAUSTED, failure.getCode());
        assertEquals("RESOURCE_EXHAUSTED: the queue is full", failure.getMessage());
        assertEquals("QUEUE_FULL", failure.getReason());
        assertEquals(Map.of("spec.model", "x"), failure.getViolations());
        assertEquals(java.time.Duration.ofSeconds(3, 5), failure.getRetryAfter());
        assertNull(SafelightException.of(Status.UNAVAILABLE, null).getRetryAfter());
    }

    @Test
    void aConnectionThatIsNotAnsweredEnds() throws Exception {
        try (var silent = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
            String target = "127.0.0.1:" + silent.getLocalPort();
            ManagedChannel channel = NettyChannelBuilder.forTarget(target).usePlaintext().build();
            var servers = new Servers(List.of(() -> channel), java.time.Duration.ofMillis(50));
            var brief = new EventSubscription.Persistence(java.time.Duration.ZERO, 0);
            try (var client = new SafelightClient(servers, brief)) {
                var failure = assertThrows(SafelightException.class, client::models);
                assertEquals(Status.Code.UNAVAILABLE, failure.getCode());
                assertTrue(failure.getMessage().contains("no answer to the connection"), failure.getMessage());
                try (var development = client.generate("a red potion")) {
                    assertThrows(SafelightException.class, () -> development.iterator().hasNext());
                }
            }
        }
    }

    @Test
    void rawPixelsBecomeAnImage() throws Exception {
        byte[] rows = {1, 2, 3, -1, 0, 0, 0, 0, 4, 5, 6, -1, 0, 0, 0, 0}; // a pixel and 4 bytes of padding in each row
        var data = ByteString.copyFrom(rows);
        var topDown = new Event.Picture(0, Received.RAW, 1, 2, 8, false, 7, data);
        var bottomUp = new Event.Picture(0, Received.RAW, 1, 2, 8, true, 7, data);
        assertEquals(0xFF010203, Images.decode(topDown).getRGB(0, 0));
        assertEquals(0xFF040506, Images.decode(topDown).getRGB(0, 1));
        assertEquals(0xFF040506, Images.decode(bottomUp).getRGB(0, 0));
        var unknown = new Event.Picture(0, "image/webp", 1, 2, 0, false, 7, data);
        assertInstanceOf(java.io.IOException.class, assertThrows(Exception.class, () -> Images.decode(unknown)));
    }
}
