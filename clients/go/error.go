package safelight

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error says why the server refused a call, why a generation failed, or that no server could be reached.
//
// errors.Is(err, context.DeadlineExceeded) and errors.Is(err, context.Canceled) hold for the codes of these names.
type Error struct {
	Code    codes.Code
	Message string
	// Reason is a stable name for programs, such as "QUEUE_FULL"; empty where the server sent none.
	Reason string
	// FieldViolations is, for an invalid request, what to change: the path of each field and a description.
	FieldViolations map[string]string
	// RetryAfter is the time after which to retry; valid only if Retryable.
	RetryAfter time.Duration
	// Retryable says that the server has named RetryAfter.
	Retryable bool

	status *status.Status
}

// Error has the code and the message.
func (e *Error) Error() string { return fmt.Sprintf("safelight: %v: %s", e.Code, e.Message) }

// GRPCStatus is the whole status, with all its details.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is compares with the errors of package context.
func (e *Error) Is(target error) bool {
	return e.Code == codes.DeadlineExceeded && target == context.DeadlineExceeded ||
		e.Code == codes.Canceled && target == context.Canceled
}

func newError(err error) *Error {
	found := status.Convert(err)
	if _, ok := status.FromError(err); !ok {
		found = status.FromContextError(err)
	}
	e := &Error{Code: found.Code(), Message: found.Message(), status: found}
	for _, detail := range found.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			e.Reason = detail.GetReason()
		case *errdetails.BadRequest:
			e.FieldViolations = map[string]string{}
			for _, violation := range detail.GetFieldViolations() {
				e.FieldViolations[violation.GetField()] = violation.GetDescription()
			}
		case *errdetails.RetryInfo:
			e.RetryAfter, e.Retryable = detail.GetRetryDelay().AsDuration(), true
		}
	}
	return e
}

func unfinished(generation string) *Error {
	if generation == "" {
		generation = "the generation"
	}
	return newError(status.Errorf(codes.Unavailable, "the stream of %s ended before the generation had finished", generation))
}
