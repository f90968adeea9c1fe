package safelight

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/safelight/safelight/clients/go/safelightv1"
)

const (
	windowBytes    = 64 << 10 // previews wait at the server, where newer ones replace older ones
	connectTimeout = 5 * time.Second
	pieceBytes     = 32 << 10 // of a picture, in one message
)

// A Client is a connection to a server, or to several replicas of one. It is safe for use by several goroutines.
type Client struct {
	servers  []*server
	apiKey   string
	patience time.Duration
	retries  int
	at       atomic.Int64 // index of the server that new calls use
	closed   atomic.Bool
}

type config struct {
	apiKey      string
	credentials credentials.TransportCredentials
	patience    time.Duration
	retries     int
	dialOptions []grpc.DialOption
}

// An Option is an argument of [NewClient].
type Option func(*config)

// WithAPIKey sends a key as a bearer token.
func WithAPIKey(key string) Option { return func(c *config) { c.apiKey = strings.TrimSpace(key) } }

// WithTransportCredentials makes the client use TLS. Without it the connection is plain text.
func WithTransportCredentials(credentials credentials.TransportCredentials) Option {
	return func(c *config) { c.credentials = credentials }
}

// WithPatience says how long the client tries to resume a generation after a lost connection, counted from its last event;
// 60 seconds by default. Before the first event it is at most 5 seconds.
func WithPatience(patience time.Duration) Option { return func(c *config) { c.patience = patience } }

// WithRetries says how often a refused request is sent again if the refusal says after which time; 3 times by default. The
// client waits for that time, within its patience and the deadline.
func WithRetries(retries int) Option { return func(c *config) { c.retries = retries } }

// WithDialOptions adds gRPC dial options, such as interceptors.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(c *config) { c.dialOptions = append(c.dialOptions, options...) }
}

// NewClient makes a client of "host:port". Several replicas are separated by commas: if one fails, the client calls the next
// one, which continues each generation that was accepted as replicated. Nothing is connected before the first call.
func NewClient(target string, options ...Option) (*Client, error) {
	c := config{credentials: insecure.NewCredentials(), patience: 60 * time.Second, retries: 3}
	for _, option := range options {
		option(&c)
	}
	if strings.ContainsFunc(c.apiKey, func(r rune) bool { return r < '!' || r > '~' }) {
		return nil, errors.New("safelight: the API key must be visible ASCII characters")
	}
	client := &Client{apiKey: c.apiKey, patience: c.patience, retries: c.retries}
	for one := range strings.SplitSeq(target, ",") {
		one = strings.TrimSpace(one)
		if one == "" {
			client.Close()
			return nil, fmt.Errorf("safelight: target %q names no server", target)
		}
		server, err := newServer(one, append(dialOptions(one, c.credentials), c.dialOptions...))
		if err != nil {
			client.Close()
			return nil, fmt.Errorf("safelight: target %q: %w", one, err)
		}
		client.servers = append(client.servers, server)
	}
	return client, nil
}

func dialOptions(target string, credentials credentials.TransportCredentials) []grpc.DialOption {
	reconnect := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials),
		grpc.WithInitialWindowSize(windowBytes),
		// While a stream is open, a server that is frozen is noticed within 15 seconds.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: connectTimeout}),
	}
	if isLocal(target) {
		options = append(options, grpc.WithNoProxy())
	}
	return options
}

// isLocal says whether a target is on this machine: a unix socket, localhost or a loopback address.
func isLocal(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "dns:", "passthrough:///"} {
		target = strings.TrimPrefix(target, scheme)
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = strings.Trim(target, "[]")
	}
	ip := net.ParseIP(host)
	return host == "localhost" || strings.HasSuffix(host, ".localhost") || ip != nil && ip.IsLoopback()
}

// Close closes all connections.
func (c *Client) Close() error {
	c.closed.Store(true)
	var all []error
	for _, server := range c.servers {
		all = append(all, server.close())
	}
	return errors.Join(all...)
}

// Conn is for stubs of other services. It makes each call at the server that is current at that moment.
func (c *Client) Conn() grpc.ClientConnInterface { return current{c} }

// Generate starts a generation and yields its events: [*Accepted], [*Progress], [*Preview] and [*Picture] as they come, then
// [*Finished]. If the generation does not finish, the last element is an error, an [*Error].
//
// A request without a RequestId gets one, so that it can be sent again without running twice. A deadline of the context
// is the deadline of the generation, over all connections. Leaving the loop ends the stream: the server suspends the
// generation, and cancels it after its grace period.
func (c *Client) Generate(ctx context.Context, request *pb.GenerateRequest) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		sent := proto.CloneOf(request)
		if sent.GetRequestId() == "" {
			sent.RequestId = uuid.NewString()
		}
		c.develop(ctx, sent, &received{at: int(c.at.Load()), preview: sent.GetPreview()}, yield)
	}
}

// Watch watches an existing generation, "generations/ID", from its first event on; preview may be nil.
func (c *Client) Watch(ctx context.Context, generation string, preview *pb.PreviewPolicy) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		c.develop(ctx, nil, &received{at: int(c.at.Load()), name: generation, preview: preview}, yield)
	}
}

// Get returns the present state of a generation.
func (c *Client) Get(ctx context.Context, generation string) (*pb.Generation, error) {
	response, err := ask(ctx, c, func(ctx context.Context, conn grpc.ClientConnInterface) (*pb.GetGenerationResponse, error) {
		return pb.NewGenerationServiceClient(conn).GetGeneration(ctx, &pb.GetGenerationRequest{Name: generation})
	})
	return response.GetGeneration(), err
}

// Cancel stops a generation and returns its final state, with the step that each output had reached.
func (c *Client) Cancel(ctx context.Context, generation string) (*pb.Generation, error) {
	response, err := ask(ctx, c, func(ctx context.Context, conn grpc.ClientConnInterface) (*pb.CancelGenerationResponse, error) {
		return pb.NewGenerationServiceClient(conn).CancelGeneration(ctx, &pb.CancelGenerationRequest{Name: generation})
	})
	return response.GetGeneration(), err
}

// UploadImage uploads a picture: PNG, JPEG or WebP. Its name can then be the InitImage or the Mask of a spec, for as long as
// the server keeps it.
func (c *Client) UploadImage(ctx context.Context, data []byte) (*pb.Image, error) {
	digest := sha256.Sum256(data)
	response, err := ask(ctx, c, func(ctx context.Context, conn grpc.ClientConnInterface) (*pb.UploadImageResponse, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		upload, err := pb.NewImageServiceClient(conn).UploadImage(ctx)
		if err != nil {
			return nil, err
		}
		err = upload.Send(&pb.UploadImageRequest{Sha256: digest[:], TotalBytes: int64(len(data))})
		for piece := range slices.Chunk(data, pieceBytes) {
			if err != nil {
				break
			}
			err = upload.Send(&pb.UploadImageRequest{Data: piece})
		}
		if err != nil && !errors.Is(err, io.EOF) { // EOF: the server has answered before it has read everything
			return nil, err
		}
		return upload.CloseAndRecv()
	})
	return response.GetImage(), err
}

// Models returns all models of the server.
func (c *Client) Models(ctx context.Context) ([]*pb.Model, error) {
	var models []*pb.Model
	for token := ""; ; {
		page, err := ask(ctx, c, func(ctx context.Context, conn grpc.ClientConnInterface) (*pb.ListModelsResponse, error) {
			return pb.NewModelServiceClient(conn).ListModels(ctx, &pb.ListModelsRequest{PageToken: token})
		})
		if err != nil {
			return nil, err
		}
		models = append(models, page.GetModels()...)
		if token = page.GetNextPageToken(); token == "" {
			return models, nil
		}
	}
}

// ask makes a call at the current server; if that cannot be reached, at the next ones in turn.
func ask[Response any](
	ctx context.Context, c *Client, call func(context.Context, grpc.ClientConnInterface) (Response, error),
) (Response, error) {
	for left := len(c.servers) - 1; ; left-- {
		at := int(c.at.Load())
		conn, release := c.servers[at].use()
		response, err := call(c.authorized(ctx), conn)
		release()
		if err == nil {
			return response, nil
		}
		failure := c.failure(ctx, err)
		if failure.Code != codes.Unavailable || left == 0 {
			return response, failure
		}
		c.next(at)
	}
}

// failure converts the error of a call. A server that stops ends calls as Canceled without a reason; such a call counts as a
// lost connection, unless its caller has canceled it or closed the client.
func (c *Client) failure(ctx context.Context, err error) *Error {
	failure := newError(err)
	if failure.Code != codes.Canceled || failure.Reason != "" || ctx.Err() != nil || c.closed.Load() {
		return failure
	}
	return newError(status.Errorf(codes.Unavailable, "the call was canceled, and not by its caller: %s", failure.Message))
}

// next is the server to use after one that failed. Generations that lose a server at the same time move to the same next
// one, and only the first of them changes the server of new calls.
func (c *Client) next(failed int) int {
	after := (failed + 1) % len(c.servers)
	c.at.CompareAndSwap(int64(failed), int64(after))
	return after
}

func (c *Client) authorized(ctx context.Context) context.Context {
	if c.apiKey == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.apiKey)
}
