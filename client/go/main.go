// Command painter is a complete client of denoised: it loads or reuses a pipeline, derives a second one, makes pictures
// with both while it shows the progress, cancels a generation, and reads the reason of an error.
//
//	painter [HOST:PORT [FOLDER]]
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"time"

	pb "denoised/v1"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	// gRPC itself stops at 4 MiB, which one large picture exceeds.
	maxMessageBytes = 256 << 20
	// What is left of it is the deadline of every call.
	patience = 5 * time.Minute
	domain   = "denoised"
)

type painter struct {
	pipelines   pb.PipelineServiceClient
	generations pb.GenerationServiceClient
}

func main() {
	target, folder := "127.0.0.1:50051", "."
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	if len(os.Args) > 2 {
		folder = os.Args[2]
	}
	if err := paint(target, folder); err != nil {
		log.Fatal(explain(err))
	}
}

func paint(target, folder string) error {
	security, err := transport()
	if err != nil {
		return err
	}
	connection, err := grpc.Dial(target, security, grpc.WithDefaultCallOptions(
		grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes), grpc.ForceCodec(codec{})))
	if err != nil {
		return err
	}
	defer connection.Close()
	p := painter{pb.NewPipelineServiceClient(connection), pb.NewGenerationServiceClient(connection)}
	ctx, done := context.WithTimeout(context.Background(), patience)
	defer done()
	if token := os.Getenv("DENOISED_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	source, err := p.load(ctx, "demo", "painter-go")
	if err != nil {
		return err
	}
	derived, err := p.pipelines.DerivePipeline(ctx, &pb.DerivePipelineRequest{
		Source:     source.Name,
		Derivation: &pb.Derivation{Task: pb.Task_TASK_IMAGE_TO_IMAGE},
		PipelineId: "editor-go",
	})
	if err != nil {
		return err
	}
	editor := derived.Pipeline
	fmt.Printf("derived %s: %d bytes of its own, %d shared\n", editor.Name, editor.ExclusiveBytes, editor.SharedBytes)

	apple, err := p.generate(ctx, &pb.GenerateRequest{
		Pipeline: source.Name,
		Prompt:   proto.String("red apple"),
		Sampling: &pb.Sampling{NumInferenceSteps: proto.Int32(12), Seeds: []uint64{1}},
	})
	if err != nil {
		return err
	}
	tangerine, err := p.generate(ctx, &pb.GenerateRequest{
		Pipeline: editor.Name,
		Prompt:   proto.String("tangerine"),
		Image:    apple,
		Sampling: &pb.Sampling{NumInferenceSteps: proto.Int32(12), Strength: proto.Float64(0.7), Seeds: []uint64{2}},
	})
	if err != nil {
		return err
	}
	for name, artifact := range map[string]*pb.Artifact{"apple.png": apple, "tangerine.png": tangerine} {
		if err := os.WriteFile(filepath.Join(folder, name), artifact.GetData(), 0o644); err != nil {
			return err
		}
	}
	if err := p.leave(ctx, source.Name); err != nil {
		return err
	}
	if err := p.misspell(ctx, source.Name); err != nil {
		return err
	}
	for _, name := range []string{editor.Name, source.Name} {
		if _, err := p.pipelines.UnloadPipeline(ctx, &pb.UnloadPipelineRequest{Name: name}); err != nil {
			return err
		}
	}
	return nil
}

// transport is plain text unless the environment names an authority to trust ("system" for the usual ones) or a
// certificate to show, as PEM files.
func transport() (grpc.DialOption, error) {
	ca, certificate, key := os.Getenv("DENOISED_CA"), os.Getenv("DENOISED_CLIENT_CERT"), os.Getenv("DENOISED_CLIENT_KEY")
	if ca == "" && certificate == "" {
		return grpc.WithInsecure(), nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" && ca != "system" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate", ca)
		}
	}
	if certificate != "" {
		pair, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config)), nil
}

// load returns the pipeline of that id, which is loaded only where it is not live yet.
func (p painter) load(ctx context.Context, repo, id string) (*pb.Pipeline, error) {
	stream, err := p.pipelines.LoadPipeline(ctx, &pb.LoadPipelineRequest{
		Spec:       &pb.PipelineSpec{RepoId: repo, Task: pb.Task_TASK_TEXT_TO_IMAGE},
		PipelineId: id,
	})
	if err != nil {
		return nil, err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if pipeline := response.GetPipeline(); pipeline != nil {
			fmt.Printf("loaded %s: %s\n", pipeline.Name, pipeline.PipelineClass)
			return pipeline, nil
		}
		progress := response.GetProgress()
		fmt.Printf("%s %s: %d of %d bytes\n", progress.Phase, progress.Role, progress.CompletedBytes, progress.TotalBytes)
	}
}

// generate shows the progress and returns the first image.
func (p painter) generate(ctx context.Context, request *pb.GenerateRequest) (*pb.Artifact, error) {
	stream, err := p.generations.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	var image *pb.Artifact
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return image, nil
		}
		if err != nil {
			return nil, err
		}
		switch event := response.Event.(type) {
		case *pb.GenerateResponse_Queued:
			fmt.Printf("%d before this one\n", event.Queued.Position)
		case *pb.GenerateResponse_Progress:
			fmt.Printf("step %d of %d\n", event.Progress.CompletedSteps, event.Progress.TotalSteps)
		case *pb.GenerateResponse_PhaseBegan:
			fmt.Println(event.PhaseBegan.Phase)
		case *pb.GenerateResponse_Output:
			if event.Output.Field == "images" && event.Output.Index == 0 {
				image = event.Output.Artifact
			}
		}
	}
}

// leave ends a generation after its third step: cancelling the call's context stops the denoising.
func (p painter) leave(ctx context.Context, pipeline string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.generations.Generate(ctx, &pb.GenerateRequest{
		Pipeline: pipeline,
		Prompt:   proto.String("castle"),
		Sampling: &pb.Sampling{NumInferenceSteps: proto.Int32(900)},
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if status.Code(err) == codes.Canceled {
			fmt.Println("cancelled")
			return nil
		}
		if err != nil {
			return err
		}
		if response.GetProgress().GetCompletedSteps() >= 3 {
			cancel()
		}
	}
}

// misspell asks for something that does not exist, to show what an error says.
func (p painter) misspell(ctx context.Context, pipeline string) error {
	_, err := p.generate(ctx, &pb.GenerateRequest{
		Pipeline:  pipeline,
		Arguments: map[string]*pb.Value{"promt": {Kind: &pb.Value_StringValue{StringValue: "red apple"}}},
	})
	if reason(err).GetReason() != "UNKNOWN_ARGUMENT" {
		return fmt.Errorf("a misspelled argument was not refused: %w", err)
	}
	fmt.Println("refused:", explain(err))
	return nil
}

// reason returns the ErrorInfo of a failed call, or nil.
func reason(err error) *errdetails.ErrorInfo {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Domain == domain {
			return info
		}
	}
	return nil
}

func explain(err error) string {
	info := reason(err)
	if info == nil {
		return err.Error()
	}
	return fmt.Sprintf("%s: %s (did you mean %q?)", info.Reason, status.Convert(err).Message(), info.Metadata["suggestion"])
}

// codec marshals what today's generator makes. Older versions of gRPC only know what the one before it made; leave this
// out with google.golang.org/grpc 1.36 or newer.
type codec struct{}

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}

func (codec) Name() string { return "proto" }
