// A complete client of denoised: loads or reuses a pipeline, derives a second one, makes pictures with both while it
// shows the progress, cancels a generation, and reads the reason of an error.
//
//     painter [HOST:PORT [FOLDER]]

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "denoised/v1/generation_service.grpc.pb.h"
#include "denoised/v1/pipeline_service.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace pb = denoised::v1;

namespace {

// gRPC itself stops at 4 MiB, which one large picture exceeds.
constexpr int kMaxMessageBytes = 256 << 20;
constexpr std::chrono::minutes kPatience{2};
constexpr int kCancelAfterSteps = 3;

// A failed call: its status, and the ErrorInfo that says why.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const grpc::Status& status) : std::runtime_error(status.error_message()), code(status.error_code()) {
    google::rpc::Status details;
    details.ParseFromString(status.error_details());
    for (const auto& detail : details.details()) {
      if (detail.UnpackTo(&info) && info.domain() == "denoised") return;
    }
    info.Clear();
  }

  grpc::StatusCode code;
  google::rpc::ErrorInfo info;
};

void Check(const grpc::Status& status) {
  if (!status.ok()) throw Failure(status);
}

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string ReadFile(const std::string& path) {
  std::ostringstream text;
  if (!path.empty() && !(text << std::ifstream(path, std::ios::binary).rdbuf())) {
    throw std::runtime_error(path + " cannot be read");
  }
  return text.str();
}

// Plain text, unless the environment names an authority to trust ("system" for the usual ones) or a certificate to show,
// as PEM files.
std::shared_ptr<grpc::ChannelCredentials> Transport() {
  const auto ca = Environment("DENOISED_CA"), certificate = Environment("DENOISED_CLIENT_CERT");
  if (ca.empty() && certificate.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  if (ca != "system") options.pem_root_certs = ReadFile(ca);
  options.pem_cert_chain = ReadFile(certificate);
  options.pem_private_key = ReadFile(Environment("DENOISED_CLIENT_KEY"));
  return grpc::SslCredentials(options);
}

// The context of one call: its deadline and its token. A context serves one call only.
std::unique_ptr<grpc::ClientContext> Context() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + kPatience);
  if (const auto token = Environment("DENOISED_TOKEN"); !token.empty()) {
    context->AddMetadata("authorization", "Bearer " + token);
  }
  return context;
}

class Painter {
 public:
  explicit Painter(const std::shared_ptr<grpc::Channel>& channel)
      : pipelines_(pb::PipelineService::NewStub(channel)), generations_(pb::GenerationService::NewStub(channel)) {}

  // The pipeline of that id, which is loaded only where it is not live yet.
  pb::Pipeline Load(const std::string& repo, const std::string& id) {
    pb::LoadPipelineRequest request;
    request.mutable_spec()->set_repo_id(repo);
    request.mutable_spec()->set_task(pb::TASK_TEXT_TO_IMAGE);
    request.set_pipeline_id(id);
    auto context = Context();
    auto stream = pipelines_->LoadPipeline(context.get(), request);
    pb::LoadPipelineResponse response;
    pb::Pipeline pipeline;
    while (stream->Read(&response)) {
      if (response.has_pipeline()) {
        pipeline = response.pipeline();
      } else {
        const auto& progress = response.progress();
        std::cout << progress.phase() << ' ' << progress.role() << ": " << progress.completed_bytes() << " of "
                  << progress.total_bytes() << " bytes\n";
      }
    }
    Check(stream->Finish());
    std::cout << "loaded " << pipeline.name() << ": " << pipeline.pipeline_class() << '\n';
    return pipeline;
  }

  pb::Pipeline Derive(const std::string& source, pb::Task task, const std::string& id) {
    pb::DerivePipelineRequest request;
    request.set_source(source);
    request.mutable_derivation()->set_task(task);
    request.set_pipeline_id(id);
    pb::DerivePipelineResponse response;
    Check(pipelines_->DerivePipeline(Context().get(), request, &response));
    const auto& pipeline = response.pipeline();
    std::cout << "derived " << pipeline.name() << ": " << pipeline.exclusive_bytes() << " bytes of its own, "
              << pipeline.shared_bytes() << " shared\n";
    return pipeline;
  }

  // Shows the progress and returns the first image. Leaves the call after `cancel_after` steps, which stops the
  // denoising; Failure then has the code CANCELLED.
  pb::Artifact Generate(const pb::GenerateRequest& request, std::optional<int> cancel_after = std::nullopt) {
    auto context = Context();
    auto stream = generations_->Generate(context.get(), request);
    pb::GenerateResponse response;
    pb::Artifact image;
    while (stream->Read(&response)) {
      switch (response.event_case()) {
        case pb::GenerateResponse::kQueued:
          std::cout << response.queued().position() << " before this one\n";
          break;
        case pb::GenerateResponse::kProgress:
          std::cout << "step " << response.progress().completed_steps() << " of " << response.progress().total_steps()
                    << '\n';
          if (cancel_after && response.progress().completed_steps() >= *cancel_after) context->TryCancel();
          break;
        case pb::GenerateResponse::kPhaseBegan:
          std::cout << response.phase_began().phase() << '\n';
          break;
        case pb::GenerateResponse::kOutput:
          if (response.output().field() == "images" && response.output().index() == 0) {
            image = response.output().artifact();
          }
          break;
        default:
          break;
      }
    }
    Check(stream->Finish());
    return image;
  }

  void Unload(const std::string& name) {
    pb::UnloadPipelineRequest request;
    request.set_name(name);
    pb::UnloadPipelineResponse response;
    Check(pipelines_->UnloadPipeline(Context().get(), request, &response));
  }

 private:
  std::unique_ptr<pb::PipelineService::Stub> pipelines_;
  std::unique_ptr<pb::GenerationService::Stub> generations_;
};

pb::GenerateRequest Request(const std::string& pipeline, const std::string& prompt, int steps, uint64_t seed) {
  pb::GenerateRequest request;
  request.set_pipeline(pipeline);
  request.set_prompt(prompt);
  request.mutable_sampling()->set_num_inference_steps(steps);
  request.mutable_sampling()->add_seeds(seed);
  return request;
}

void Save(const pb::Artifact& artifact, const std::filesystem::path& path) {
  std::ofstream file(path, std::ios::binary);
  file << artifact.data();
}

std::string Explain(const Failure& failure) {
  if (failure.info.reason().empty()) return failure.what();
  std::string text = failure.info.reason() + ": " + failure.what();
  const auto& metadata = failure.info.metadata();
  if (const auto found = metadata.find("suggestion"); found != metadata.end()) {
    text += " (did you mean \"" + found->second + "\"?)";
  }
  return text;
}

// Asks for something that does not exist, to show what an error says.
void Misspell(Painter& painter, const std::string& pipeline) {
  pb::GenerateRequest request;
  request.set_pipeline(pipeline);
  (*request.mutable_arguments())["promt"].set_string_value("red apple");
  try {
    painter.Generate(request);
  } catch (const Failure& failure) {
    if (failure.info.reason() != "UNKNOWN_ARGUMENT") throw;
    std::cout << "refused: " << Explain(failure) << '\n';
    return;
  }
  throw std::logic_error("a misspelled argument was not refused");
}

// Ends a generation after a few steps.
void Leave(Painter& painter, const std::string& pipeline) {
  try {
    painter.Generate(Request(pipeline, "castle", 900, 3), kCancelAfterSteps);
  } catch (const Failure& failure) {
    if (failure.code != grpc::StatusCode::CANCELLED) throw;
    std::cout << "cancelled\n";
  }
}

void Paint(const std::string& target, const std::filesystem::path& folder) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  Painter painter(grpc::CreateCustomChannel(target, Transport(), arguments));

  const auto source = painter.Load("demo", "painter-cpp");
  const auto editor = painter.Derive(source.name(), pb::TASK_IMAGE_TO_IMAGE, "editor-cpp");
  const auto apple = painter.Generate(Request(source.name(), "red apple", 12, 1));
  Save(apple, folder / "apple.png");
  auto request = Request(editor.name(), "tangerine", 12, 2);
  *request.mutable_image() = apple;
  request.mutable_sampling()->set_strength(0.7);
  Save(painter.Generate(request), folder / "tangerine.png");
  Leave(painter, source.name());
  Misspell(painter, source.name());
  painter.Unload(editor.name());
  painter.Unload(source.name());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Paint(argc > 1 ? argv[1] : "127.0.0.1:50051", argc > 2 ? argv[2] : ".");
  } catch (const Failure& failure) {
    std::cerr << Explain(failure) << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
