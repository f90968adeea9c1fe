package safelight

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestTargetsOfThisMachine(t *testing.T) {
	for target, local := range map[string]bool{
		"127.0.0.1:8421": true, "localhost:8421": true, "[::1]:8421": true, "dns:///localhost:8421": true,
		"unix:/run/safelight.sock": true, "a.localhost:1": true, "127.0.0.2": true,
		"safelight.example:8421": false, "10.0.0.1:8421": false, "[2001:db8::1]:8421": false,
	} {
		if isLocal(target) != local {
			t.Errorf("isLocal(%q) is %v", target, !local)
		}
	}
}

func TestArgumentsThatCannotBeUsed(t *testing.T) {
	for _, target := range []string{"", " ", "a:1,"} {
		if _, err := NewClient(target); err == nil {
			t.Errorf("target %q is taken", target)
		}
	}
	if _, err := NewClient("a:1", WithAPIKey("a b")); err == nil {
		t.Error("a key with a blank is taken")
	}
}

func TestGenerationsThatLoseAServerTogetherAskTheNextOne(t *testing.T) {
	client, err := NewClient("a:1,b:1,c:1")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range 24 {
		if next := client.next(0); next != 1 {
			t.Fatalf("one asks server %d", next)
		}
	}
	if at := client.at.Load(); at != 1 {
		t.Errorf("new calls ask server %d", at)
	}
}

func TestErrorsAreReadable(t *testing.T) {
	full, err := status.New(codes.ResourceExhausted, "the queue is full").WithDetails(
		&errdetails.ErrorInfo{Reason: "QUEUE_FULL", Domain: "safelight"},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "spec.model", Description: "x"}}},
	)
	if err != nil {
		t.Fatal(err)
	}
	failure := newError(full.Err())
	if failure.Reason != "QUEUE_FULL" || !failure.Retryable || failure.RetryAfter != 3*time.Second {
		t.Errorf("%+v", failure)
	}
	if failure.FieldViolations["spec.model"] != "x" {
		t.Errorf("%v", failure.FieldViolations)
	}
	if late := newError(context.DeadlineExceeded); !errors.Is(late, context.DeadlineExceeded) || late.Code != codes.DeadlineExceeded {
		t.Errorf("%+v", late)
	}
}

func TestACallThatNobodyHasCancelledIsLost(t *testing.T) {
	client, err := NewClient("a:1")
	if err != nil {
		t.Fatal(err)
	}
	bare := status.Error(codes.Canceled, "CANCELLED")
	if failure := client.failure(t.Context(), bare); failure.Code != codes.Unavailable {
		t.Errorf("%+v", failure)
	}
	said, err := status.New(codes.Canceled, "it was cancelled").WithDetails(&errdetails.ErrorInfo{Reason: "GENERATION_CANCELLED"})
	if err != nil {
		t.Fatal(err)
	}
	if failure := client.failure(t.Context(), said.Err()); failure.Code != codes.Canceled {
		t.Errorf("%+v", failure)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if failure := client.failure(ctx, bare); failure.Code != codes.Canceled {
		t.Errorf("%+v", failure)
	}
	client.Close()
	if failure := client.failure(t.Context(), bare); failure.Code != codes.Canceled {
		t.Errorf("%+v", failure)
	}
}

func TestGenerationsThatAreRefusedTogetherReplaceTheirConnectionOnce(t *testing.T) {
	client, err := NewClient("a:1")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server := client.servers[0]
	draining, release := server.use()
	server.giveUp(draining)
	fresh, releaseFresh := server.use()
	if fresh == draining {
		t.Fatal("new calls use the connection that was given up")
	}
	server.giveUp(draining)
	if again, releaseAgain := server.use(); again != fresh {
		t.Error("it was replaced twice")
	} else {
		releaseAgain()
	}
	releaseFresh()
	if state := draining.GetState(); state == connectivity.Shutdown {
		t.Error("it is closed although a call is under way")
	}
	release()
	for draining.GetState() != connectivity.Shutdown {
		draining.WaitForStateChange(t.Context(), draining.GetState())
	}
}
