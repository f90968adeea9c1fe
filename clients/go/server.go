package safelight

import (
	"context"
	"errors"
	"slices"
	"sync"

	"google.golang.org/grpc"
)

// server is one target of a client and the connection to it, which is replaced if the server drains.
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

// use returns the connection for a call that begins now. It stays open until release is called, after the call.
func (s *server) use() (conn *connection, release func()) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.conn.calls.Add(1)
	return s.conn, s.conn.calls.Done
}

// giveUp makes new calls use a new connection, which a load balancer may lead to another server; open calls stay on the old
// one. Generations that are refused at the same time replace a connection only once.
func (s *server) giveUp(old *connection) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.closed || s.conn != old {
		return
	}
	conn, err := grpc.NewClient(s.target, s.options...)
	if err != nil { // cannot happen: the same arguments were accepted before
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

// current makes calls at the server that new calls of a client use.
type current struct{ client *Client }

// Invoke makes a unary call.
func (c current) Invoke(ctx context.Context, method string, args, reply any, options ...grpc.CallOption) error {
	conn, release := c.client.servers[c.client.at.Load()].use()
	defer release()
	return conn.Invoke(ctx, method, args, reply, options...)
}

// NewStream makes a streaming call.
func (c current) NewStream(
	ctx context.Context, description *grpc.StreamDesc, method string, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	conn, release := c.client.servers[c.client.at.Load()].use()
	over := sync.OnceFunc(release)
	options = append(slices.Clip(options), grpc.OnFinish(func(error) { over() }))
	return conn.NewStream(ctx, description, method, options...)
}
