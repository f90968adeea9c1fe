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
	// Reason is a stable name for programs, such as "QUEUE_FULL"; empty if the server sent none.
	Reason string
	// FieldViolations says what to change in an invalid request: a description by the path of each field.
	FieldViolations map[string]string
	// RetryAfter is the time after which to retry; valid only if Retryable.
	RetryAfter time.Duration
	// Retryable says whether the server has sent RetryAfter.
	Retryable bool

	status *status.Status
}

// Error returns the code and the message as one text.
func (e *Error) Error() string { return fmt.Sprintf("safelight: %v: %s", e.Code, e.Message) }

// GRPCStatus returns the whole status, with all its details.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is says whether the error corresponds to context.DeadlineExceeded or context.Canceled.
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
