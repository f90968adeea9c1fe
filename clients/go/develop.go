package safelight

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	pb "github.com/safelight/safelight/clients/go/safelightv1"
)

const (
	firstPatience = 5 * time.Second // while no event was received, so that a wrong address fails soon
	firstWait     = 100 * time.Millisecond
	maxWait       = 2 * time.Second
	draining      = "DRAINING" // reason of a server that accepts no new requests
)

var (
	// After these reasons the same generation can be resumed; "" is a lost connection.
	resumable = []string{"", "WATCHER_STALLED", "MOVED", "OTHER_MODEL"}
	// After these reasons the same call can succeed at another replica.
	elsewhere = []string{draining, "UNAVAILABLE"}
)

// develop follows a generation over as many connections as necessary. A nil request only watches.
func (c *Client) develop(ctx context.Context, request *pb.GenerateRequest, r *received, yield func(Event, error) bool) {
	tries, refusals, drains, numEvents := 0, 0, 0, 0
	giveUpAt := time.Now().Add(min(firstPatience, c.patience))
	for {
		failure, left := c.follow(ctx, request, r, yield)
		if left || failure == nil {
			return
		}
		if r.numEvents > numEvents {
			tries, refusals, drains, numEvents = 0, 0, 0, r.numEvents
			giveUpAt = time.Now().Add(c.patience)
		}
		goesOnElsewhere := r.durable || r.name == ""
		movable := len(c.servers) > 1 && goesOnElsewhere
		if failure.Reason == draining {
			if drains == 0 {
				giveUpAt = time.Now().Add(c.patience)
			}
			drains++
		}
		var wait time.Duration
		switch {
		case isResumable(failure, movable):
			wait = scaled(min(maxWait, firstWait<<min(tries, 10)), 0.5, 1)
			tries++
		case failure.Reason == draining && goesOnElsewhere:
			wait = scaled(max(failure.RetryAfter, firstWait), 1, 1.2)
		case isRefusedForNow(failure, r) && refusals < c.retries:
			if refusals == 0 {
				giveUpAt = time.Now().Add(c.patience)
			}
			wait = scaled(failure.RetryAfter, 1, 1.2) // clients must not all retry at the same moment
			refusals++
		default:
			yield(nil, failure)
			return
		}
		again := time.Now().Add(wait)
		deadline, bounded := ctx.Deadline()
		if again.After(giveUpAt) || failure.Retryable && bounded && again.After(deadline) {
			yield(nil, failure)
			return
		}
		if movable && failure.Reason != "WATCHER_STALLED" {
			r.at = c.next(r.at)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			yield(nil, newError(ctx.Err()))
			return
		}
	}
}

// follow receives one connection to its end. left says whether the caller has left the loop.
func (c *Client) follow(
	ctx context.Context, request *pb.GenerateRequest, r *received, yield func(Event, error) bool,
) (failure *Error, left bool) {
	ctx, cancel := context.WithCancel(c.authorized(ctx))
	defer cancel() // tells the server that nobody watches
	conn, release := c.servers[r.at].use()
	defer release()
	receive, err := open(ctx, conn, request, r)
	for err == nil {
		var message *pb.GenerationEvent
		if message, err = receive(); err != nil {
			break
		}
		event, damage := r.take(message)
		if damage != nil {
			return damage.(*Error), false
		}
		if event != nil && !yield(event, nil) {
			return nil, true
		}
	}
	if !errors.Is(err, io.EOF) {
		failure = c.failure(ctx, err)
		if failure.Reason == draining {
			c.servers[r.at].giveUp(conn)
		}
		return failure, false
	}
	if !r.finished {
		return unfinished(r.name), false
	}
	return nil, false
}

// open starts the generation, or watches it if it has a name already. The returned function receives the next event.
func open(
	ctx context.Context, conn grpc.ClientConnInterface, request *pb.GenerateRequest, r *received,
) (func() (*pb.GenerationEvent, error), error) {
	service := pb.NewGenerationServiceClient(conn)
	if r.name == "" {
		stream, err := service.Generate(ctx, request)
		return events(stream, err)
	}
	stream, err := service.WatchGeneration(ctx, r.watch())
	return events(stream, err)
}

func events[Response any, Message interface {
	*Response
	GetEvent() *pb.GenerationEvent
}](stream grpc.ServerStreamingClient[Response], err error) (func() (*pb.GenerationEvent, error), error) {
	if err != nil {
		return nil, err
	}
	return func() (*pb.GenerationEvent, error) {
		response, err := stream.Recv()
		return Message(response).GetEvent(), err
	}, nil
}

// isResumable says whether the same generation can be resumed; movable says whether another server can continue it.
func isResumable(failure *Error, movable bool) bool {
	return failure.Code == codes.Unavailable &&
		(slices.Contains(resumable, failure.Reason) || movable && slices.Contains(elsewhere, failure.Reason))
}

// isRefusedForNow says whether the server has said when to retry, and nothing has started.
func isRefusedForNow(failure *Error, r *received) bool {
	return failure.Retryable && (failure.Code == codes.ResourceExhausted || r.name == "")
}

func scaled(wait time.Duration, least, most float64) time.Duration {
	return time.Duration(float64(wait) * (least + (most-least)*rand.Float64()))
}
