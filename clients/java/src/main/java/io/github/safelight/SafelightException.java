package io.github.safelight;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** Says why the server refused a call, why a generation failed, or that no server could be reached. */
public final class SafelightException extends RuntimeException {
    private static final long serialVersionUID = 1;

    private final Status.Code code;
    private final String reason;
    private final transient Map<String, String> violations;
    private final @Nullable Duration retryAfter;

    private SafelightException(Status status, com.google.rpc.@Nullable Status details) {
        super(status.getCode() + (status.getDescription() == null ? "" : ": " + status.getDescription()),
                status.getCause());
        String reason = "";
        Map<String, String> violations = new LinkedHashMap<>();
        Duration retryAfter = null;
        try {
            for (Any detail : details == null ? java.util.List.<Any>of() : details.getDetailsList()) {
                if (detail.is(ErrorInfo.class)) {
                    reason = detail.unpack(ErrorInfo.class).getReason();
                } else if (detail.is(BadRequest.class)) {
                    detail.unpack(BadRequest.class).getFieldViolationsList()
                            .forEach(one -> violations.put(one.getField(), one.getDescription()));
                } else if (detail.is(RetryInfo.class)) {
                    var delay = detail.unpack(RetryInfo.class).getRetryDelay();
                    retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
                }
            }
        } catch (InvalidProtocolBufferException damaged) {
            addSuppressed(damaged); // the code and the message are still valid
        }
        this.code = status.getCode();
        this.reason = reason;
        this.violations = Collections.unmodifiableMap(violations);
        this.retryAfter = retryAfter;
    }

    static SafelightException of(Status status, @Nullable Metadata trailers) {
        return new SafelightException(
                status, trailers == null ? null : StatusProto.fromStatusAndTrailers(status, trailers));
    }

    static SafelightException of(StatusRuntimeException failure) {
        Status said = lostOrSaid(failure.getStatus(), failure.getTrailers(), Context.current());
        return of(said.withCause(failure), failure.getTrailers());
    }

    /**
     * The status of a call as its caller gets it. A server that stops ends calls as CANCELLED without a reason; that counts
     * as a lost connection, unless the call was ended here, by an exception or by the context in which it was made.
     */
    static Status lostOrSaid(Status status, @Nullable Metadata trailers, Context context) {
        boolean cancelled = status.getCode() == Status.Code.CANCELLED && of(status, trailers).reason.isEmpty();
        return cancelled && status.getCause() == null && !context.isCancelled()
                ? Status.UNAVAILABLE.withDescription(
                        "the call was cancelled, and not by its caller: " + status.getDescription())
                : status;
    }

    static SafelightException interrupted(InterruptedException cause) {
        return of(Status.CANCELLED.withDescription("the reader was interrupted").withCause(cause), null);
    }

    /** {@return the status code of gRPC} */
    public Status.Code getCode() {
        return code;
    }

    /** {@return a stable name for programs, such as {@code "QUEUE_FULL"}; empty where the server sent none} */
    public String getReason() {
        return reason;
    }

    /** {@return for an invalid request, what to change: the path of each field and a description} */
    public Map<String, String> getViolations() {
        return violations;
    }

    /** {@return the time after which to retry; null where the server named none} */
    public @Nullable Duration getRetryAfter() {
        return retryAfter;
    }
}
