package safelight

import (
	"context"
	"errors"
	"slices"
	"sync"

	"google.golang.org/grpc"
)

// server is one target of a client and the connection to it, which is replaced where the server drains.
type server struct {
	target  string
	options []grpc.DialOption

	mutex   sync.Mutex
	conn    *connection
	givenUp map[*connection]struct{}
	closed  bool
}

// connection counts the calls that use it, so that it is closed after the last one.
type connection struct {
	*grpc.ClientConn
	calls sync.WaitGroup
}

func newServer(target string, options []grpc.DialOption) (*server, error) {
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	first := &connection{ClientConn: conn}
	return &server{target: target, options: options, conn: first, givenUp: map[*connection]struct{}{}}, nil
}

// use is the connection for a call that begins now. It stays open until the call is over and release is called.
func (s *server) use() (conn *connection, release func()) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.conn.calls.Add(1)
	return s.conn, s.conn.calls.Done
}

// giveUp makes new calls use a new connection, which a load balancer may give to another server; calls that are under way
// stay on the old one. Generations that are refused together give up the same connection: the first of them replaces it.
func (s *server) giveUp(old *connection) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.closed || s.conn != old {
		return
	}
	conn, err := grpc.NewClient(s.target, s.options...)
	if err != nil { // the same arguments were taken before
		return
	}
	s.conn = &connection{ClientConn: conn}
	s.givenUp[old] = struct{}{}
	go func() {
		old.calls.Wait()
		s.mutex.Lock()
		defer s.mutex.Unlock()
		delete(s.givenUp, old)
		old.Close()
	}()
}

func (s *server) close() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.closed = true
	all := []error{s.conn.Close()}
	for old := range s.givenUp {
		all = append(all, old.Close())
	}
	return errors.Join(all...)
}

// current makes calls at the server that new calls of a client ask.
type current struct{ client *Client }

// Invoke makes a call with one answer.
func (c current) Invoke(ctx context.Context, method string, args, reply any, options ...grpc.CallOption) error {
	conn, release := c.client.servers[c.client.at.Load()].use()
	defer release()
	return conn.Invoke(ctx, method, args, reply, options...)
}

// NewStream makes a call that streams.
func (c current) NewStream(
	ctx context.Context, description *grpc.StreamDesc, method string, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	conn, release := c.client.servers[c.client.at.Load()].use()
	over := sync.OnceFunc(release)
	options = append(slices.Clip(options), grpc.OnFinish(func(error) { over() }))
	return conn.NewStream(ctx, description, method, options...)
}
